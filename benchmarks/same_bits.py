"""Did a change keep every bit? Records what small runs leave behind, and compares two such records.

    python benchmarks/same_bits.py record before.json    # in the tree as it was
    python benchmarks/same_bits.py record after.json     # in the tree as it is
    python benchmarks/same_bits.py compare before.json after.json

A record holds a hash of every tensor that a run saved and of every validation image, its `metrics.jsonl` line by line,
its ledger row by row, and the metrics of an audit. Compare records of one machine: bits depend on the kind of CPU and
the number of threads.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
LATEST = {"resume_from_checkpoint": "latest"}
ALWAYS = {
    "train_batch_size": 2,
    "learning_rate": 5e-3,
    "lr_warmup_steps": 2,
    "merge_every_epochs": 1,
    "num_train_epochs": 3,
    "num_shards": 3,
    "agc_threshold": 0.9,
    "agc_decay": 0.3,
    "caption_dropout": 0.2,
    "validation_rounds": 1,
    "report_to": "none",
    "resolution": 16,
}
PIXELS = {"caption_dropout": 0, "model_config": "PIXELS", "class_column": "kind", "shard_strategy": "stratified"}
LORA = {"use_lora": True, "rank": 2}
HALVES = " in halves"  # what a pipeline's name ends in here if most of it is stored in half precision
PICTURES = {"validation_prompts": ["thing 3"], "num_validation_images": 1, "validation_inference_steps": 2}
# Name -> (pipeline or None, ranks, flags); a second dictionary of flags is a second command in the same folder.
RUNS: dict[str, tuple[str | None, int, list[dict[str, Any]]]] = {
    "full, EMA, min-SNR, flips": (
        "StableDiffusionPipeline",
        1,
        [{"use_ema": True, "snr_gamma": 5.0, "random_flip": True, "holdout_fraction": 0.3, "center_crop": True}],
    ),
    "full, uncached, accumulated, stopped and resumed": (
        "StableDiffusionPipeline",
        1,
        [
            {"cache_latents": False, "gradient_accumulation_steps": 2, "max_train_steps": 3, "merge_every_epochs": 2},
            {"cache_latents": False, "gradient_accumulation_steps": 2, "max_train_steps": 6, "merge_every_epochs": 2}
            | LATEST,
        ],
    ),
    "full, outer momentum, averaged moments, files": (
        "StableDiffusionPipeline",
        1,
        [
            {
                "optimizer_across_rounds": "average",
                "outer_lr": 0.7,
                "outer_momentum": 0.9,
                "offload_dir": "OFFLOAD",
                "merge_weighting": "uniform",
            }
        ],
    ),
    "full, 3 shards on 2 ranks": ("StableDiffusionPipeline", 2, [{"use_ema": True}]),
    "full, 1 shard on 2 ranks": ("StableDiffusionPipeline", 2, [{"num_shards": 1, "train_batch_size": 3}]),
    "LoRA, exact, EMA": ("StableDiffusionPipeline", 1, [{**LORA, "use_ema": True, "lora_export": "fuse"}]),
    "LoRA, exact, 2 ranks, resumed": (
        "StableDiffusionPipeline",
        2,
        [{**LORA, "num_train_epochs": 2}, {**LORA, "num_train_epochs": 4, "checkpointing_steps": 1} | LATEST],
    ),
    "LoRA, averaged factors": ("StableDiffusionPipeline", 1, [{**LORA, "lora_merge": "average", "outer_lr": 0.5}]),
    "SDXL": ("StableDiffusionXLPipeline", 1, [{"agc_threshold": 0.5}]),
    "SD 3, logit-normal": ("StableDiffusion3Pipeline", 1, [{"weighting_scheme": "logit_normal"}]),
    "Flux, LoRA": ("FluxPipeline", 1, [{**LORA, "optimizer_across_rounds": "reset"}]),
    "PixArt": ("PixArtAlphaPipeline", 1, [{"gradient_checkpointing": True}]),
    "halves: full, uncached": ("StableDiffusionPipeline" + HALVES, 1, [{**PICTURES, "cache_latents": False}]),
    "halves: SDXL, LoRA, bf16": (
        "StableDiffusionXLPipeline" + HALVES,
        1,
        [{**LORA, **PICTURES, "mixed_precision": "bf16", "lora_export": "fuse"}],
    ),
    "halves: SD 3, LoRA, uncached": (
        "StableDiffusion3Pipeline" + HALVES,
        1,
        [{**LORA, **PICTURES, "cache_latents": False, "lora_export": "fuse"}],
    ),
    "halves: Flux, LoRA, bf16, 2 ranks, stopped and resumed": (
        "FluxPipeline" + HALVES,
        2,
        [
            {**LORA, **PICTURES, "mixed_precision": "bf16", "num_train_epochs": 2},
            {**LORA, **PICTURES, "mixed_precision": "bf16", "num_train_epochs": 3} | LATEST,
        ],
    ),
    "halves: PixArt, LoRA, EMA": (
        "PixArtAlphaPipeline" + HALVES,
        1,
        [{**LORA, **PICTURES, "use_ema": True, "lora_export": "fuse", "save_dtype": "float32"}],
    ),
    "halves: PixArt, LoRA, bf16, compared with held-out images": (
        "PixArtAlphaPipeline" + HALVES,
        1,
        [{**LORA, "mixed_precision": "bf16", "stop_when": "auto", "holdout_fraction": 0.4, "lora_export": "fuse"}],
    ),
    "pixels from scratch, by class": (None, 1, [PIXELS | {"shard_by_column": "kind", "use_ema": True}]),
}
AUDITED = "full, EMA, min-SNR, flips"
AUDIT = ["--num_images", "12", "--num_inference_steps", "2", "--membership_images", "12", "--eval_batch_size", "4"]


def save_inputs(folder: Path) -> None:
    """A tiny pipeline of every kind, and 20 images, two of them twice, with captions and classes."""
    from PIL import Image

    from iet_finetune.families.tiny import save_tiny_pipeline

    for kind in {kind for kind, _, _ in RUNS.values() if kind is not None}:
        save_tiny_pipeline(kind.removesuffix(HALVES), folder / kind)
        if kind.endswith(HALVES):
            halve(folder / kind)
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(20):
        height, width = rng.integers(4, 8, 2)
        tiles = rng.integers(0, 256, (height, width, 3)) if i < 18 else tiles  # noqa: F821 - of the image before
        pixels = np.kron(tiles, np.ones((5, 5, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"thing {i}", "kind": i % 2}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    network = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "attention_head_dim": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "num_class_embeds": 2,
    }
    (folder / "network.json").write_text(json.dumps(network), encoding="utf-8")


def halve(folder: Path) -> None:
    """Stores a pipeline's models in half precision, but for some layers of T5, as its makers do."""
    import torch
    from safetensors.torch import load_file, save_file

    halves = {"text_encoder": torch.float16, "transformer": torch.float16}
    for file in folder.rglob("*.safetensors"):
        dtype = halves.get(file.parent.name, torch.bfloat16)
        tensors = load_file(file)
        stored = {name: tensor if ".wo." in name else tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(stored, file, metadata={"format": "pt"})


def command(ranks: int) -> list[str]:
    """Starts the training script on so many ranks."""
    if ranks == 1:
        return [sys.executable, "train_iet_agc.py"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [sys.executable, *launcher, "train_iet_agc.py"]


def run(words: list[str], folder: Path) -> None:
    """Runs a command in the tree with one thread and the caches in `folder`; ends this program if it fails."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}\n{done.stderr}")


def train(name: str, folder: Path) -> Path:
    """Trains one of `RUNS`; returns what it leaves."""
    kind, ranks, stages = RUNS[name]
    output = folder / "runs" / name
    source = {"pretrained_model_name_or_path": str(folder / str(kind))}
    for flags in stages:
        settings = {**ALWAYS, **(source if kind else {}), "train_data_dir": str(folder / "images"), **flags}
        settings["output_dir"] = str(output)
        if kind is None:
            settings["model_config"] = str(folder / "network.json")
        if "offload_dir" in settings:
            settings["offload_dir"] = str(folder / "offload")
        config = folder / f"{name}.json"
        config.write_text(json.dumps(settings), encoding="utf-8")
        run([*command(ranks), "--config", str(config)], folder)
    return output


def recorded(output: Path) -> dict[str, Any]:
    """What a run left: tensors and images by hash, metrics, ledger."""
    import torch
    from PIL import Image
    from pyarrow import parquet
    from safetensors.torch import load_file

    weights = {}
    for path in sorted(output.rglob("*.safetensors")):
        inside = path.relative_to(output)
        if not str(inside).startswith("checkpoint-"):
            for key, tensor in load_file(path).items():
                stored = tensor.flatten().view(torch.uint8).numpy().tobytes()
                weights[f"{inside}: {key} {tensor.dtype}"] = hashlib.sha256(stored).hexdigest()[:16]
    pictures = sorted(output.glob("validation/*.png"))
    return {
        "weights": weights,
        "pictures": {path.name: hashlib.sha256(Image.open(path).tobytes()).hexdigest()[:16] for path in pictures},
        "metrics": [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()],
        "ledger": parquet.read_table(output / "ledger.parquet").to_pylist(),
    }


def record(path: Path, parallel: int) -> None:
    """Writes the record of all runs, and of an audit of one of them."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        save_inputs(folder)
        with ThreadPoolExecutor(parallel) as pool:
            outputs = dict(zip(RUNS, pool.map(lambda name: train(name, folder), RUNS), strict=True))
        records = {name: recorded(output) for name, output in outputs.items()}
        run([sys.executable, "-m", "iet_finetune", "audit", "--model", str(outputs[AUDITED]), *AUDIT], folder)
        records["audit"] = json.loads((outputs[AUDITED] / "audit" / "audit.json").read_text("utf-8"))
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    print(f"{len(RUNS)} runs and an audit are recorded in {path}")


# Keys of an audit that were renamed, and those that say when, where and with which version it was made.
RENAMED = {"null": "baseline", "null_low": "baseline_low", "null_high": "baseline_high"}
IGNORED = {"date", "command", "version", "versions", "iet_finetune", "model", "fingerprint", "training_fingerprint"}


def comparable(value: Any) -> Any:
    """A record with its keys as they are called now, and without what differs between any two runs."""
    if isinstance(value, dict):
        # The ledger names images by their paths, in a temporary folder here.
        return {
            RENAMED.get(key, key): Path(item).name if key == "image" else comparable(item)
            for key, item in value.items()
            if key not in IGNORED
        }
    return [comparable(item) for item in value] if isinstance(value, list) else value


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two records differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for key in sorted(one.keys() | other.keys())
            for line in differences(one.get(key, "nothing"), other.get(key, "nothing"), f"{place} > {key}")
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{place} > {i}")]
    return [] if one == other or (one != one and other != other) else [f"{place[3:]}: {one} | {other}"]


def compare(before: Path, after: Path) -> int:
    """Prints where the records differ; returns the exit code."""
    records = [comparable(json.loads(path.read_text("utf-8"))) for path in (before, after)]
    found = differences(*records)
    print("\n".join(line[:200] for line in found[:40]) or f"the same bits in {len(records[0]) - 1} runs and an audit")
    if len(found) > 40:
        print(f"... and {len(found) - 40} more")
    return 1 if found else 0


def main() -> int:
    """Records or compares, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record")
    recording.add_argument("record", type=Path)
    recording.add_argument("--parallel", type=int, default=2, help="runs at a time")
    comparing = actions.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "compare":
        return compare(arguments.before, arguments.after)
    record(arguments.record, arguments.parallel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
