"""A plain loop in bf16, as diffusers' train_text_to_image.py runs one, to compare the speed with; written anew."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel


def plain_loop(pipeline: Any, steps: int, batch: int, size: int, after_step: Callable[[], None]) -> None:
    """Trains the UNet for some steps.

    As that script does: images and captions are encoded in every step, by a VAE and a text encoder in bf16; autocast
    around a UNet in fp32 with gradient checkpointing; AdamW as torch makes it; gradients clipped to 1; diffusers' EMA;
    and the loss is read back in every step. Images come from memory.
    """
    device = torch.device("cuda")
    unet = pipeline.unet.to(device, torch.float32).train().requires_grad_(True)
    vae, text_encoder = (
        each.to(device, torch.bfloat16).requires_grad_(False) for each in (pipeline.vae, pipeline.text_encoder)
    )
    unet.enable_gradient_checkpointing()
    average = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=1e-2)
    pixels = torch.rand(batch, 3, size, size).mul_(2).sub_(1).pin_memory()
    tokens = pipeline.tokenizer(
        ["a picture"] * batch, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    for _ in range(steps):
        latents = vae.encode(pixels.to(device, torch.bfloat16)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(len(schedule), (batch,), device=device)
        noisy = schedule.add_noise(latents.float(), noise.float(), timesteps).to(torch.bfloat16)
        states = text_encoder(tokens.to(device), return_dict=False)[0]
        with torch.autocast("cuda", torch.bfloat16):
            prediction = unet(noisy, timesteps, states, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        loss.item()
        after_step()
