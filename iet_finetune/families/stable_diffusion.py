"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a VAE, and a UNet with cross-attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.transfer import to_device
from .base import Conditions, Family, check_resolution


class StableDiffusion(Family):
    """`StableDiffusionPipeline`, predicting the noise (1.x, 2.x-base) or v (2.x at 768 pixels)."""

    channels_per_latent = 1

    @property
    def side_multiple(self) -> int:
        """What the VAE and the UNet's downsampling divide sides by."""
        return self.pipeline.vae_scale_factor * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Returns (C, R/f, R/f); the resolution must fit the VAE and the UNet's downsampling."""
        factor = self.pipeline.vae_scale_factor
        check_resolution(resolution, self.side_multiple)
        return self.pipeline.unet.config.in_channels, resolution // factor, resolution // factor

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the VAE's posterior in fp32."""
        posterior = self.pipeline.vae.encode(pixel_values).latent_dist
        return posterior.mean, posterior.std

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Returns (mean + std · noise) times the VAE's scaling factor."""
        return (mean + std * noise) * self.pipeline.vae.config.scaling_factor

    @property
    def reader(self) -> tuple[Any, int]:
        """CLIP's tokenizer and the number of its tokens."""
        tokenizer = self.pipeline.tokenizer or self.pipeline.tokenizer_2
        return tokenizer, tokenizer.model_max_length

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Conditions:
        """Returns the text encoder's last hidden state; longer captions are truncated."""
        tokenizer, text_encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        tokens = tokenizer(
            list(captions),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {"encoder_hidden_states": text_encoder(to_device(tokens.input_ids, text_encoder.device))[0]}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Returns the UNet's output for (x_t, t, text)."""
        return self.network(noisy_latents, timesteps, **conditions, return_dict=False)[0]
