"""Stable Diffusion 3 and 3.5: two CLIP text encoders, T5 or none, and a transformer trained by flow matching."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..config.config import Config
from ..errors import UserError
from .base import Conditions, check_resolution
from .flow import FlowFamily
from .text import clip_states, require_parts, t5_states


class StableDiffusion3(FlowFamily):
    """`StableDiffusion3Pipeline`; without T5 the transformer receives zeros in place of T5's states.

    Raises:
        UserError: a CLIP text encoder is missing, or as `FlowFamily`.
    """

    caption_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_layers = (
        *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    channels_per_latent = 1
    weighting_scheme = "logit_normal"
    default_sequence_length = 256

    def __init__(self, pipeline: Any, config: Config = Config()) -> None:  # noqa: B008 - frozen
        super().__init__(pipeline, config)
        require_parts(pipeline, ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"))

    @property
    def side_multiple(self) -> int:
        """Pixels of a patch."""
        return self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size

    @property
    def longest_side(self) -> int:
        """Pixels of a side of the position embedding, of which the middle is taken."""
        return self.pipeline.transformer.config.pos_embed_max_size * self.side_multiple

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Returns (C, R/f, R/f); the resolution must fit the VAE, the patches and the position embedding."""
        transformer, factor = self.pipeline.transformer.config, self.pipeline.vae_scale_factor
        check_resolution(resolution, self.side_multiple)
        if resolution > (largest := self.longest_side):
            raise UserError(
                f"`--resolution {resolution}` is more than the {largest} that this model can place: lower it."
            )
        return transformer.in_channels, resolution // factor, resolution // factor

    @property
    def reader(self) -> tuple[Any, int]:
        """T5's tokenizer and the number of its tokens, or CLIP's without T5."""
        if self.pipeline.text_encoder_3 is None:
            return self.pipeline.tokenizer, self.pipeline.tokenizer_max_length
        return self.pipeline.tokenizer_3, self.sequence_length

    def encode_captions(self, captions: Sequence[str]) -> Conditions:
        """Returns both CLIPs' states, concatenated and padded with zeros, followed by T5's; and CLIP's projections."""
        pipeline, length = self.pipeline, self.pipeline.tokenizer_max_length
        first, pooled = clip_states(pipeline.tokenizer, pipeline.text_encoder, captions, length)
        second, pooled_2 = clip_states(pipeline.tokenizer_2, pipeline.text_encoder_2, captions, length)
        clip, t5 = torch.cat([first, second], dim=-1), self._t5_states(captions, like=first)
        clip = functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([clip, t5], dim=1),
            "pooled_projections": torch.cat([pooled, pooled_2], dim=-1),
        }

    def _t5_states(self, captions: Sequence[str], like: Tensor) -> Tensor:
        if self.pipeline.text_encoder_3 is None:
            return like.new_zeros(
                len(captions), self.sequence_length, self.pipeline.transformer.config.joint_attention_dim
            )
        return t5_states(self.pipeline.tokenizer_3, self.pipeline.text_encoder_3, captions, self.sequence_length)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Returns the transformer's output for (x_σ, σ T, text)."""
        sigma = self.objective.sigma(timesteps)
        return self.network(noisy_latents, timestep=sigma * len(self.objective), **conditions, return_dict=False)[0]
