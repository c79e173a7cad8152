"""Base class of the families trained by flow matching in the latents of a VAE."""

from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..config.config import Config
from ..config.settings import TrainingConfig
from ..errors import UserError
from ..method.objective import FlowMatching
from .base import Family

# The longest sequence that diffusers' pipelines accept.
LONGEST_SEQUENCE = 512


class FlowFamily(Family):
    """A transformer that receives sigma and predicts noise - latents.

    The noise levels are those of the pipeline's scheduler, its fixed shift included. With a scheduler that shifts by
    resolution at sampling time they are evenly spaced. Both follow diffusers' training scripts.

    Raises:
        UserError: the scheduler is of another kind, or a flag does not apply.
    """

    denoiser_name = "transformer"
    features: ClassVar[tuple[str, ...]] = ("flow matching", "T5", "prompts")
    # Defaults of diffusers' script of the family, and of its pipeline.
    weighting_scheme: ClassVar[str]
    default_sequence_length: ClassVar[int]
    objective: FlowMatching

    def __init__(self, pipeline: Any, config: Config = Config()) -> None:  # noqa: B008 - frozen
        super().__init__(pipeline, config)
        if self.sequence_length > LONGEST_SEQUENCE:
            raise UserError(
                f"`--max_sequence_length {self.sequence_length}` is longer than the {LONGEST_SEQUENCE} tokens that a "
                f"{type(pipeline).__name__} can draw with: lower it."
            )

    def make_objective(self) -> FlowMatching:
        """Returns flow matching over the noise levels of the pipeline's scheduler."""
        scheduler, training = self.pipeline.scheduler, self.config.training
        if not type(scheduler).__name__.startswith("FlowMatch"):
            raise UserError(
                f"the pipeline's scheduler is a {type(scheduler).__name__}, and a {type(self.pipeline).__name__} is "
                "trained with a FlowMatchEulerDiscreteScheduler: save the pipeline with one."
            )
        scheme = training.weighting_scheme or self.weighting_scheme
        for name, own in (("logit_mean", "logit_normal"), ("logit_std", "logit_normal"), ("mode_scale", "mode")):
            value = getattr(training, name)
            if scheme != own and value != getattr(TrainingConfig(), name):
                raise UserError(f"`--{name} {value}` does nothing with weighting scheme {scheme}, only with {own}.")
        # A new scheduler, because sampling leaves its own noise levels in the old one.
        return FlowMatching(
            FlowMatchEulerDiscreteScheduler.from_config(scheduler.config).sigmas,
            scheme,
            training.logit_mean,
            training.logit_std,
            training.mode_scale,
        )

    @property
    def sequence_length(self) -> int:
        """Number of T5 tokens per caption."""
        return self.config.training.max_sequence_length or self.default_sequence_length

    @property
    def call_options(self) -> dict[str, Any]:
        """Samples with the sequence length of training."""
        return {"max_sequence_length": self.sequence_length}

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the VAE's posterior in fp32."""
        posterior = self.pipeline.vae.encode(pixel_values).latent_dist
        return posterior.mean, posterior.std

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """(mean + std · noise - shift) times the VAE's scaling factor; the shift is 0 if the VAE has none."""
        vae = self.pipeline.vae.config
        return (mean + std * noise - (vae.shift_factor or 0.0)) * vae.scaling_factor
