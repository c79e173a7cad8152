"""Flux.1: CLIP's pooled state, T5's states, and a transformer over packed latents, trained by flow matching."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.config import Config
from .base import Conditions, check_resolution
from .flow import FlowFamily
from .text import clip_pooled, require_parts, t5_states

# The default of diffusers' script and of the pipeline.
DEFAULT_GUIDANCE = 3.5


class Flux(FlowFamily):
    """`FluxPipeline`: dev, which is conditioned on a guidance scale, and schnell, which is not.

    Raises:
        UserError: a text encoder is missing, the model takes no guidance scale, or as `FlowFamily`.
    """

    caption_encoders = ("text_encoder", "text_encoder_2")
    features = (*FlowFamily.features, "guidance embedding")
    lora_layers = (
        *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    channels_per_latent = 4
    weighting_scheme = "none"
    default_sequence_length = 512

    def __init__(self, pipeline: Any, config: Config = Config()) -> None:  # noqa: B008 - frozen
        super().__init__(pipeline, config)
        require_parts(pipeline, ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"))
        # Of tokens and of packed latents, by their numbers and kind: made anew, a step would wait for the device.
        self._positions: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        if not pipeline.transformer.config.guidance_embeds:
            self.refuse("guidance_scale")

    @property
    def side_multiple(self) -> int:
        """Pixels of 2 x 2 latents, which are packed into one."""
        return self.pipeline.vae_scale_factor * 2

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Returns (C, R/f, R/f); the resolution must fit the VAE and the packing of 2 x 2 latents into one."""
        factor = self.pipeline.vae_scale_factor
        check_resolution(resolution, self.side_multiple)
        return self.pipeline.transformer.config.in_channels // 4, resolution // factor, resolution // factor

    @property
    def reader(self) -> tuple[Any, int]:
        """T5's tokenizer and the number of its tokens."""
        return self.pipeline.tokenizer_2, self.sequence_length

    def encode_captions(self, captions: Sequence[str]) -> Conditions:
        """Returns T5's states and CLIP's pooled state."""
        pipeline, length = self.pipeline, self.pipeline.tokenizer_max_length
        return {
            "encoder_hidden_states": t5_states(
                pipeline.tokenizer_2, pipeline.text_encoder_2, captions, self.sequence_length
            ),
            "pooled_projections": clip_pooled(pipeline.tokenizer, pipeline.text_encoder, captions, length),
        }

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Returns the transformer's output for (x_σ, σ, guidance, text), packing and unpacking the latents."""
        pipeline, (count, channels, height, width) = self.pipeline, noisy_latents.shape
        kind: dict[str, Any] = {"device": noisy_latents.device, "dtype": noisy_latents.dtype}
        tokens = conditions["encoder_hidden_states"].shape[1]
        txt_ids, img_ids = self._ids(tokens, height // 2, width // 2, kind)
        prediction = self.network(
            hidden_states=pipeline._pack_latents(noisy_latents, count, channels, height, width),
            timestep=self.objective.sigma(timesteps),
            guidance=self._guidance(count, kind),
            txt_ids=txt_ids,
            img_ids=img_ids,
            **conditions,
            return_dict=False,
        )[0]
        factor = pipeline.vae_scale_factor
        return pipeline._unpack_latents(prediction, height * factor, width * factor, factor)

    def _ids(self, tokens: int, height: int, width: int, kind: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The positions of so many tokens, (T, 3), and of so many packed latents, (H W, 3)."""
        key = (tokens, height, width, *kind.values())
        if key not in self._positions:
            img_ids = self.pipeline._prepare_latent_image_ids(1, height, width, **kind)
            self._positions[key] = torch.zeros(tokens, 3, **kind), img_ids
        return self._positions[key]

    def _guidance(self, count: int, kind: dict[str, Any]) -> Tensor | None:
        if not self.pipeline.transformer.config.guidance_embeds:
            return None
        scale = self.config.training.guidance_scale
        return torch.full((count,), DEFAULT_GUIDANCE if scale is None else scale, **kind)
