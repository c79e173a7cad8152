"""Small denoisers of pixels for tests, and the images that they are trained on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

RESOLUTION = 16
NETWORK = {
    "sample_size": RESOLUTION,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def tiny_pixels(
    prediction_type: str = "epsilon", channels: int = 3, timesteps: int = 10, **network: Any
) -> DDPMPipeline:
    """A DDPM pipeline with the same random weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(**{**NETWORK, "in_channels": channels, "out_channels": channels, **network})
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=timesteps, prediction_type=prediction_type))


def save_pictures(folder: Path, count: int, kinds: tuple[Any, ...] = ()) -> Path:
    """So many images of coloured squares, with a metadata file of `kinds` in turn if there are any."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "kind": kinds[i % len(kinds)] if kinds else None}))
    if kinds:
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def pictures(folder: Path) -> torch.Tensor:
    """(N, 3, R, R) in [-1, 1], read without the package."""
    arrays = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
