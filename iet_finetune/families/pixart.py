"""PixArt-alpha and PixArt-sigma: T5 with an attention mask, and a diffusion transformer that predicts the noise."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.config import Config
from ..data.transfer import to_device
from .base import Conditions, check_resolution
from .stable_diffusion import StableDiffusion
from .text import require_parts


class PixArt(StableDiffusion):
    """`PixArtAlphaPipeline` and `PixArtSigmaPipeline`.

    If the transformer also predicts a variance, that half of its channels is not trained; the pipelines do not use it.

    Raises:
        UserError: T5 is missing.
    """

    denoiser_name = "transformer"
    features = (*StableDiffusion.features, "T5")

    def __init__(self, pipeline: Any, config: Config = Config()) -> None:  # noqa: B008 - frozen
        super().__init__(pipeline, config)
        require_parts(pipeline, ("tokenizer", "text_encoder"))

    @property
    def sequence_length(self) -> int:
        """Number of T5 tokens per caption; by default that of the pipeline."""
        default = 120 if type(self.pipeline).__name__ == "PixArtAlphaPipeline" else 300
        return self.config.training.max_sequence_length or default

    @property
    def reader(self) -> tuple[Any, int]:
        """T5's tokenizer and the number of its tokens."""
        return self.pipeline.tokenizer, self.sequence_length

    @property
    def call_options(self) -> dict[str, Any]:
        """Samples with the sequence length, captions and resolution of training."""
        return {
            "max_sequence_length": self.sequence_length,
            "clean_caption": False,
            "use_resolution_binning": False,
        }

    @property
    def side_multiple(self) -> int:
        """Pixels of a patch."""
        return self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Returns (C, R/f, R/f); the resolution must fit the VAE and the patches."""
        factor = self.pipeline.vae_scale_factor
        check_resolution(resolution, self.side_multiple)
        return self.pipeline.transformer.config.in_channels, resolution // factor, resolution // factor

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Conditions:
        """Returns T5's last hidden states of the lower-cased captions, and their attention mask."""
        pipeline = self.pipeline
        tokens = pipeline.tokenizer(
            pipeline._text_preprocessing(list(captions)),
            padding="max_length",
            max_length=self.sequence_length,
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = (
            to_device(each, pipeline.text_encoder.device) for each in (tokens.input_ids, tokens.attention_mask)
        )
        states = pipeline.text_encoder(ids, attention_mask=mask)[0]
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def details(self, sizes: Tensor, labels: Tensor) -> Conditions:
        """Returns height and width (B, 2) and their ratio (B, 1) as the pipeline does, for a model that takes them."""
        if not self.denoiser.use_additional_conditions:
            return {}
        resolution = sizes[:, 4:].float()
        return {"resolution": resolution, "aspect_ratio": resolution[:, :1] / resolution[:, 1:]}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Returns the predicted noise for (x_t, t, text, resolution)."""
        output = self.network(
            noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            encoder_attention_mask=conditions["encoder_attention_mask"],
            added_cond_kwargs={name: conditions.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return output[:, : noisy_latents.shape[1]]
