"""Training LoRA adapters: what is promised of whole denoisers holds for them, and what is promised of them alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from e2e.command import assert_same, repeatable
from peft.utils import get_peft_model_state_dict
from reference import OneRoundOfAdapters, Reference, with_adapter
from runs import Killed, assert_close, assert_equal, files, run_until, samples
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, save_tiny_sd, tiny_sd
from torch import Tensor

from iet_finetune import Config, Trainer

LORA = "pytorch_lora_weights.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
LATEST = {"resume_from_checkpoint": "latest"}
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
MERGES = ["exact", "average", "freeze_a"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps the precision of a process's first run; every test is a first run."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline of 10 timesteps, so that each is visited often enough for skips, and 12 images."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 12)
    return folder


def config(world: Path, output: Path, **flags: Any) -> Config:
    """K = 3 adapters of rank 2: a pass of a shard is two steps, a round twelve, and the third round is shorter."""
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"),
        "train_data_dir": str(world / "data"),
        "output_dir": str(output),
        "resolution": RESOLUTION,
        "use_lora": True,
        "rank": 2,
        "train_batch_size": 2,
        "num_shards": 3,
        "num_train_epochs": 5,
        "merge_every_epochs": 2,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 0,
        "agc_threshold": 0.99,
        "agc_decay": 0.1,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 2,
        "report_to": "none",
    }
    return Config.from_flags(**{**defaults, **flags})


def train(world: Path, output: Path, **flags: Any) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Trainer(config(world, output, **flags)).train()


def fused(world: Path, output: Path, **flags: Any) -> dict[str, Tensor]:
    """Trains and returns the denoiser with the adapter in its weights."""
    return load_file(train(world, output, lora_export="fuse", **flags) / UNET)


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("shards", [1, 4])
def test_learning_rate_zero_returns_the_base_bit_for_bit(world, tmp_path, merge, shards):
    flags = {"num_shards": shards, "learning_rate": 0.0, "use_ema": True, "lora_merge": merge}
    assert_equal(fused(world, tmp_path / "fused", **flags), tiny_sd().unet.state_dict())
    if merge == "exact":
        # What was published as a pipeline is published as a file now, from the last checkpoint.
        adapter = load_file(train(world, tmp_path / "file", lora_export="full_rank", **flags) / LORA)
        assert all(not tensor.any() for name, tensor in adapter.items() if ".up." in name)
        assert all(tensor.any() for name, tensor in adapter.items() if ".down." in name)


@pytest.mark.parametrize("merge", MERGES)
def test_with_one_shard_the_merge_interval_changes_no_bit(world, tmp_path, merge):
    flags = {"num_shards": 1, "num_train_epochs": 4, "use_ema": True, "lora_merge": merge}
    often = train(world, tmp_path / "often", merge_every_epochs=1, **flags)
    never = train(world, tmp_path / "never", merge_every_epochs=4, **flags)
    steps = train(world, tmp_path / "steps", merge_every_epochs=None, merge_every_steps=5, **flags)
    assert (often / LORA).read_bytes() == (never / LORA).read_bytes() == (steps / LORA).read_bytes()


@pytest.mark.parametrize("alpha", [None, 7])
def test_one_shard_equals_a_plain_loop_with_peft_bit_for_bit(world, tmp_path, alpha):
    settings = {"num_train_epochs": 3, "merge_every_epochs": 1, "seed": 3, "lora_alpha": alpha}
    ours = load_file(train(world, tmp_path / "out", num_shards=1, agc_threshold=0.0, **settings) / LORA)
    pipeline = with_adapter(tiny_sd(timesteps=10), 3, r=2, lora_alpha=alpha or 2, target_modules=ATTENTION)
    reference = Reference(pipeline, samples(world), batch=2, lr=1e-2, seed=3)
    pipeline.unet.load_state_dict(reference.train(passes=3, passes_per_round=3))
    theirs = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    assert_equal(ours, {f"unet.{name}": tensor for name, tensor in theirs.items()})
    assert all(tensor.any() for tensor in theirs.values())


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_round_of_three_shards_is_the_mean_of_what_three_plain_loops_learn(world, tmp_path, ema_decay):
    ema = {} if ema_decay is None else {"use_ema": True, "ema_max_decay": ema_decay}
    settings = {"num_train_epochs": 9, "merge_every_epochs": 9, "adam_epsilon": 1e-4, "learning_rate": 1e-3}
    ours = fused(world, tmp_path / "out", lora_alpha=8, use_rslora=True, max_train_samples=11, **settings, **ema)
    lora = {"r": 2, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION}
    reference = OneRoundOfAdapters(
        with_adapter(tiny_sd(timesteps=10), **lora),
        [samples(world)[i] for i in _kept(tmp_path / "out")],
        scaling=8 / 2**0.5,
        shards=3,
        batch=2,
        lr=1e-3,
        eps=1e-4,
        threshold=0.99,
        decay=0.1,
        ema_decay=ema_decay,
    )
    expected = reference.train(passes=9, passes_per_round=9)
    assert len(reference.skipped) > 5
    assert sum(pq.read_table(tmp_path / "out" / "ledger.parquet")["skipped"].to_pylist()) == len(reference.skipped)
    assert_close(ours, expected, tolerance=2e-5)
    base = tiny_sd().unet.state_dict()
    changed = {name for name in base if not torch.equal(ours[name], base[name])}
    assert changed == {name for name in base if name.endswith(tuple(f".{layer}.weight" for layer in ATTENTION))}
    assert max((ours[name] - base[name]).abs().max().item() for name in base) > 1e-2


def _kept(output: Path) -> list[int]:
    """Which images were trained on, by their place in the folder."""
    return [row["index"] for row in pq.read_table(output / "ledger.parquet").to_pylist()]
