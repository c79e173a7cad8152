"""Small real things for tests: pipelines that train in a second, and folders of images with captions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from iet_finetune.families.tiny import RESOLUTION as RESOLUTION
from iet_finetune.families.tiny import tiny_sd as tiny_sd
from iet_finetune.families.tiny import tiny_tokenizer as tiny_tokenizer


def save_tiny_sd(folder: Path, **settings: Any) -> Path:
    """Saves `tiny_sd(**settings)` for `from_pretrained` and returns the folder."""
    tiny_sd(**settings).save_pretrained(folder)
    return folder


def save_sd_of_one_width(folder: Path, dropout: float = 0.0) -> Path:
    """Saves such a pipeline for `--compile`; its UNet's blocks are of one kind, for each takes the compiler long."""
    pipeline = tiny_sd()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.unet = UNet2DConditionModel(
            sample_size=RESOLUTION // 2,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
            dropout=dropout,
        )
    pipeline.save_pretrained(folder)
    return folder


def save_images(folder: Path, count: int, size: int = RESOLUTION, seed: int = 0) -> Path:
    """An imagefolder of `count` pictures of coloured noise with captions, and returns the folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((size // 4, size // 4, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"thing {i}", "kind": ["even", "odd"][i % 2]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
