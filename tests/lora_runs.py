"""Short runs that train LoRA adapters in this process, and what is read of what they leave."""

import json
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import RESOLUTION
from torch import Tensor

from iet_finetune import Config, Trainer

LORA = "pytorch_lora_weights.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
LATEST = {"resume_from_checkpoint": "latest"}


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
