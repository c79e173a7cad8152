"""A loop that fine-tunes Stable Diffusion as diffusers' train_text_to_image.py does, written anew, to compare with."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset):
    """The first `count` images of a folder with captions in metadata.jsonl.

    Each is (3, resolution, resolution) fp32 in [-1, 1]: resized, cropped at random, half of the time mirrored.
    """

    def __init__(self, folder: Path, count: int, resolution: int) -> None:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        self._rows = [json.loads(line) for line in lines]
        self._folder = folder
        self._resolution = resolution

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        with PIL.Image.open(self._folder / self._rows[index]["file_name"]) as file:
            image = file.convert("RGB")
        scale = self._resolution / min(image.size)
        width, height = (int(side * scale) for side in image.size)
        image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
        left, top = (int(torch.randint(side - self._resolution + 1, ())) for side in (width, height))
        image = image.crop((left, top, left + self._resolution, top + self._resolution))
        if torch.rand(()) < 0.5:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - 0.5) / 0.5, self._rows[index]["text"]


def plain_loop(base: Path, pictures: Pictures, batch: int, after_step: Callable[[], None]) -> NoReturn:
    """Trains the UNet of the pipeline in the folder `base` and calls `after_step` after each step, without end.

    The mean loss of batches that are encoded every time, torch's own AdamW with that script's settings, gradients
    clipped to 1, a constant learning rate, and the loss read back in every step, as the script's progress bar does.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32).to(device)
    vae, text_encoder, unet = pipeline.vae, pipeline.text_encoder, pipeline.unet.train()
    vae.requires_grad_(False)
    text_encoder.requires_grad_(False)
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    rate = get_scheduler("constant", optimizer)
    loader = DataLoader(pictures, batch, shuffle=True, collate_fn=partial(collate, pipeline.tokenizer))
    while True:
        for pixel_values, input_ids in loader:
            latents = vae.encode(pixel_values.to(device)).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(len(noise_schedule), (len(latents),), device=device)
            noisy_latents = noise_schedule.add_noise(latents, noise, timesteps)
            encoder_hidden_states = text_encoder(input_ids.to(device), return_dict=False)[0]
            prediction = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), noise.float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            loss.item()
            after_step()


def collate(tokenizer: Any, samples: list[tuple[Tensor, str]]) -> tuple[Tensor, Tensor]:
    """A batch: its pixels (B, 3, R, R), and its captions as (B, L) tokens."""
    pixel_values, captions = zip(*samples, strict=True)
    length = tokenizer.model_max_length
    tokens = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return torch.stack(pixel_values), tokens.input_ids
