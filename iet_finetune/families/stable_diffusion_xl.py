"""Stable Diffusion XL: two CLIP text encoders, and a UNet conditioned on the size and crop of each image."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.config import Config
from .base import Conditions
from .stable_diffusion import StableDiffusion
from .text import clip_states, require_parts


class StableDiffusionXL(StableDiffusion):
    """`StableDiffusionXLPipeline`, predicting the noise or v; not its refiner.

    Raises:
        UserError: the second text encoder is missing.
    """

    caption_encoders = ("text_encoder", "text_encoder_2")

    def __init__(self, pipeline: Any, config: Config = Config()) -> None:  # noqa: B008 - frozen
        super().__init__(pipeline, config)
        require_parts(pipeline, ("text_encoder_2", "tokenizer_2"))
        # Mean and deviation of each channel of the latents: made anew, a step would wait for the device.
        self._statistics: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Returns (mean + std · noise) times the VAE's scaling factor, normalized by channel if the VAE says how."""
        vae = self.pipeline.vae.config
        if vae.get("latents_mean") is None or vae.get("latents_std") is None:
            return super().latents(mean, std, noise)
        sample = mean + std * noise
        kind = sample.device, sample.dtype
        if kind not in self._statistics:
            both = (torch.tensor(vae[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
            centre, spread = (numbers.to(sample) for numbers in both)
            self._statistics[kind] = centre, spread
        centre, spread = self._statistics[kind]
        return (sample - centre) / spread * vae.scaling_factor

    def encode_captions(self, captions: Sequence[str]) -> Conditions:
        """Returns both encoders' penultimate states, concatenated, and the second's projected text embedding."""
        pipeline = self.pipeline
        pairs = [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]
        outputs = [
            clip_states(tokenizer, encoder, captions, tokenizer.model_max_length)
            for tokenizer, encoder in pairs
            if encoder is not None
        ]
        states = torch.cat([states for states, _ in outputs], dim=-1)
        return {"encoder_hidden_states": states, "text_embeds": outputs[-1][1]}

    def details(self, sizes: Tensor, labels: Tensor) -> Conditions:
        """Returns (B, 6): height and width of the stored image, top and left, height and width of its crop."""
        return {"time_ids": sizes.float()}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Returns the UNet's output for (x_t, t, text, sizes)."""
        return self.network(
            noisy_latents,
            timesteps,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            added_cond_kwargs={name: conditions[name] for name in ("text_embeds", "time_ids")},
            return_dict=False,
        )[0]

    def sampling_pipeline(self) -> Any:
        """As `Family.sampling_pipeline`, treating empty prompts like the original pipeline."""
        pipeline = super().sampling_pipeline()
        empty = "force_zeros_for_empty_prompt"
        pipeline.register_to_config(**{empty: self.pipeline.config[empty]})
        return pipeline
