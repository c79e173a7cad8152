"""Short runs of the larger text-to-image families: pipelines, images, flags, and the images that come of them."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import processes
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from PIL import Image
from tiny import RESOLUTION, save_images
from tiny_families import tiny_pipeline

from iet_finetune import Config, Trainer

PROMPT = "thing 3"
SEQUENCE = 16  # tokens of T5 in these runs
LORA = "pytorch_lora_weights.safetensors"
# What of a pipeline is stored in half precision here; its denoiser is not.
HALVES = {
    "vae": torch.bfloat16,
    "text_encoder": torch.float16,
    "text_encoder_2": torch.bfloat16,
    "text_encoder_3": torch.float16,
}


def save_pipeline(folder: Path, name: str) -> Path:
    pipeline = tiny_pipeline(name)
    for part, dtype in HALVES.items():
        if getattr(pipeline, part, None) is not None:
            getattr(pipeline, part).to(dtype)
    pipeline.save_pretrained(folder)
    return folder


def build_world(folder: Path, name: str) -> Path:
    """A pipeline in `base` and eight images in `data`."""
    save_pipeline(folder / "base", name)
    save_images(folder / "data", 8)
    return folder


def options(base: Path) -> dict[str, Any]:
    """The flags of a run that a family of its own has."""
    kind = json.loads((base / "model_index.json").read_text())["_class_name"]
    return {} if kind == "StableDiffusionXLPipeline" else {"max_sequence_length": SEQUENCE}


def call_options(base: Path) -> dict[str, Any]:
    """Further arguments that make a call sample as in training; those of PixArt keep text and resolution unchanged."""
    kind = json.loads((base / "model_index.json").read_text())["_class_name"]
    plain = {"clean_caption": False, "use_resolution_binning": False} if kind.startswith("PixArt") else {}
    return {**options(base), **plain}


def config(world: Path, output: Path, **flags: Any) -> Config:
    """K = 2, two rounds of two steps a clone; images before and after."""
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"),
        "train_data_dir": str(world / "data"),
        "output_dir": str(output),
        "resolution": RESOLUTION,
        "num_shards": 2,
        "train_batch_size": 2,
        "num_train_epochs": 2,
        "merge_every_epochs": 1,
        "learning_rate": 5e-3,
        "lr_warmup_steps": 0,
        "agc_threshold": 0.5,
        "caption_dropout": 0.2,
        "validation_prompts": [PROMPT],
        "num_validation_images": 1,
        "validation_rounds": 2,
        "validation_inference_steps": 2,
        "checkpointing_steps": 1,
        "report_to": "none",
        **options(world / "base"),
    }
    return Config.from_flags(**{**defaults, **flags})


def train(world: Path, output: Path, **flags: Any) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Trainer(config(world, output, **flags)).train()


def validation_picture(output: Path, round_: int) -> np.ndarray:
    """The one image of a round, (R, R, 3) int."""
    sheet = Image.open(output / "validation" / f"round-{round_:04d}.png").convert("RGB")
    return np.asarray(sheet.crop((0, 16, RESOLUTION, 16 + RESOLUTION))).astype(int)


def furthest(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference between two images, in steps of 1/255."""
    return int(np.abs(one - other).max())


def drawn(pipeline: DiffusionPipeline, **call: Any) -> np.ndarray:
    """The image that a validation of these runs should give, (R, R, 3) int."""
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        PROMPT,
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        **call,
    ).images[0]
    return np.asarray(image).astype(int)


_DRAW = """
import json, sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
for folder, lora, call, target in json.loads(sys.argv[1]):
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    if lora:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(**call, generator=torch.Generator().manual_seed(0)).images[0]
    np.save(target, np.asarray(image).astype(int))
print(any(name.startswith("iet_finetune") for name in sys.modules))
"""


def drawn_in_a_fresh_process(folder: Path, jobs: dict[str, tuple[Path, Path | None]]) -> dict[str, np.ndarray]:
    """Name -> image, from (pipeline, folder of its LoRA file or None) by name, with nothing but diffusers."""
    plain = {"prompt": PROMPT, "height": RESOLUTION, "width": RESOLUTION, "num_inference_steps": 2}
    targets = {name: folder / f"{name}.npy" for name in jobs}
    pictures = [
        [str(base), str(lora) if lora else None, {**plain, **call_options(base)}, str(targets[name])]
        for name, (base, lora) in jobs.items()
    ]
    done = processes.run([sys.executable, "-c", _DRAW, json.dumps(pictures)])
    assert done.stdout.strip() == "False", done.stderr
    return {name: np.load(target) for name, target in targets.items()}
