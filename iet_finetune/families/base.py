"""What differs between pipelines: how images and prompts are encoded, and how the denoiser is called."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from ..config.config import Config, all_flags
from ..config.settings import ValidationConfig
from ..errors import UserError
from ..method.objective import NoiseSchedule, Objective

Conditions = dict[str, Tensor]


class Family(ABC):
    """One kind of pipeline. A new one is one file: a subclass, named in `families.FAMILIES`.

    Args:
        pipeline: the loaded `DiffusionPipeline`, all its models in fp32.
        config: the run's settings. A `--prediction_type` is also written into the scheduler that is saved.

    Attributes:
        objective: how images become noisy, and what the denoiser is to say of them.
        network: what `predict` calls: the denoiser, or what wraps it where several ranks train it together.
    """

    denoiser_name: ClassVar[str] = "unet"
    # The components that `encode_images` and `encode_captions` use; on the device only where they are needed.
    image_encoders: ClassVar[tuple[str, ...]] = ("vae",)
    caption_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    # Whether an image's latent is drawn; if not, the standard deviation of `encode_images` is 0 throughout.
    has_posterior: ClassVar[bool] = True
    # What gets an adapter unless the user says otherwise: the attention projections, as in diffusers' scripts.
    lora_layers: ClassVar[tuple[str, ...]] = ("to_k", "to_q", "to_v", "to_out.0")
    needs_captions: ClassVar[bool] = True
    # What flags may ask for (`needs` in config/flags.py); one that asks for something else is refused, not ignored.
    features: ClassVar[tuple[str, ...]] = ("noise schedule", "prompts")

    def __init__(self, pipeline: Any, config: Config = Config()) -> None:  # noqa: B008 - frozen
        self.pipeline = pipeline
        self.config = config
        features = (None, *self.features, *(("captions",) if self.needs_captions else ()))
        self.refuse(*(name for name, spec in all_flags().items() if spec.needs not in features))
        self.network: Callable[..., Any] = self.denoiser
        self.objective = self.make_objective()

    def refuse(self, *names: str) -> None:
        """Raises a `UserError` if one of these flags has another value than its default."""
        flags, defaults = self.config.to_flags(), Config().to_flags()
        for name in names:
            if flags[name] != defaults[name]:
                raise UserError(
                    f"`--{name} {flags[name]}` means nothing to a {type(self.pipeline).__name__}: leave it out."
                )

    def make_objective(self) -> Objective:
        """How images become noisy; by default the noise schedule of the pipeline's scheduler.

        Raises:
            UserError: that scheduler cannot be trained.
        """
        prediction_type = self.config.model.prediction_type
        scheduler = self.pipeline.scheduler
        if not hasattr(scheduler, "alphas_cumprod"):
            # Its settings, such as those of an EDM scheduler, would silently become the defaults of DDPM.
            raise UserError(
                f"the pipeline's scheduler, a {type(scheduler).__name__}, cannot be trained: it has no noise schedule "
                "like that of DDPM. Save the pipeline with the scheduler that it was trained with."
            )
        if prediction_type is not None:
            scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
            self.pipeline.scheduler = scheduler
        training = DDPMScheduler.from_config(scheduler.config)
        try:
            return NoiseSchedule(training.alphas_cumprod, training.config.prediction_type)
        except ValueError as error:
            raise UserError(f"the pipeline's scheduler cannot be trained: {error}. Set `--prediction_type`.") from None

    @property
    def denoiser(self) -> nn.Module:
        """The network that is trained."""
        return getattr(self.pipeline, self.denoiser_name)

    def place(self, device: torch.device, encoders: bool = True) -> None:
        """Freezes everything but the denoiser and moves what training needs beside it to the device.

        Args:
            encoders: whether images and captions will be encoded there.
        """
        self.freeze()
        for encoder in self._encoders((*self.image_encoders, *self.caption_encoders)) if encoders else ():
            encoder.to(device)
        self.objective = self.objective.to(device)

    def freeze(self) -> None:
        """Freezes everything but the denoiser."""
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(component is self.denoiser).eval()

    @contextmanager
    def lent(self, names: Sequence[str], device: torch.device) -> Iterator[None]:
        """These components are on the device inside, and where they were afterwards."""
        tensors = [
            (encoder, next(chain(encoder.parameters(), encoder.buffers()), None)) for encoder in self._encoders(names)
        ]
        homes = [(encoder, tensor.device) for encoder, tensor in tensors if tensor is not None]
        try:
            for encoder, _ in homes:
                encoder.to(device)
            yield
        finally:
            for encoder, home in homes:
                encoder.to(home)

    def _encoders(self, names: Sequence[str]) -> list[nn.Module]:
        components = (getattr(self.pipeline, name, None) for name in names)
        return [component for component in components if component is not None]

    @property
    def loads_lora(self) -> bool:
        """Whether the pipeline loads LoRA files; if not, a trained adapter is added to the weights."""
        return hasattr(self.pipeline, "load_lora_weights")

    @abstractmethod
    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of a square image; a `UserError` where the model cannot take that size."""

    @abstractmethod
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, H, W) of the posterior of images (B, 3, R, R) in [-1, 1]."""

    @abstractmethod
    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """What the denoiser sees of an image: a draw from its posterior, scaled; all (B, C, H, W)."""

    def encode_captions(self, captions: Sequence[str]) -> Conditions:
        """What the denoiser is told about each caption: tensors whose first dimension is the batch."""
        return {}

    def details(self, sizes: Tensor, labels: Tensor) -> Conditions:
        """What the denoiser is told of each image besides, as `encode_captions`.

        Args:
            sizes: (B, 4) int64: height and width of the picture as it is stored, top and left of the crop in the
                resized picture, mirrored before the crop if it is mirrored.
            labels: (B,) int64, the class; 0 without `--class_column`.
        """
        return {}

    @abstractmethod
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The denoiser's prediction (B, C, H, W); `timesteps` (B,) int64 are those of `objective`."""

    def take_classes(self, names: tuple[str, ...] | None, highest: int) -> None:
        """Learns which classes the images have, before anything is trained or drawn.

        Args:
            names: of the classes by number; None without `--class_column`.
            highest: the highest number among the training images.

        Raises:
            UserError: the model takes no classes, or not these.
        """
        if names is not None:
            raise UserError(
                f"`--class_column {self.config.data.class_column}`: the {type(self.pipeline).__name__} takes no "
                "classes: leave it out."
            )

    def prompts(self, validation: ValidationConfig) -> tuple[str, ...]:
        """What `draw` is asked for while training, and what stands above the pictures; nothing draws none."""
        return validation.validation_prompts

    def draw(
        self, pipeline: Any, prompt: str, generators: list[torch.Generator], validation: ValidationConfig, size: int
    ) -> list[Image.Image]:
        """One square picture a generator of one of the `prompts`; `pipeline` is that of `sampling_pipeline`."""
        guidance = validation.validation_guidance_scale
        return pipeline(
            [prompt] * len(generators),
            height=size,
            width=size,
            num_inference_steps=validation.validation_inference_steps,
            generator=generators,
            **({} if guidance is None else {"guidance_scale": guidance}),
            **self.call_options,
        ).images

    @property
    def call_options(self) -> dict[str, Any]:
        """What the pipeline must be told besides to draw as it was trained."""
        return {}

    def fingerprint(self) -> str:
        """A hash over the weights of all models and the scheduler's settings; two pipelines hardly ever share it."""
        return pipeline_fingerprint(self.pipeline)

    def sampling_pipeline(self) -> Any:
        """The pipeline as it stands, for drawing images while training: without safety checker or progress bar."""
        components = dict(self.pipeline.components)
        if "safety_checker" in components:
            components |= {"safety_checker": None, "requires_safety_checker": False}
        pipeline = type(self.pipeline)(**components)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def pipeline_fingerprint(pipeline: Any) -> str:
    """A hash over the weights of all models of any pipeline and its scheduler's settings."""
    settings = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    digest = hashlib.blake2b(json.dumps(settings, default=str).encode(), digest_size=16)
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, nn.Module):
            _hash_weights(digest, name, component)
        for adapter in getattr(component, "peft_config", {}).values():
            # By what its matrices are multiplied.
            digest.update(f"{adapter.lora_alpha} {adapter.alpha_pattern} {adapter.use_rslora}".encode())
    return digest.hexdigest()


def _hash_weights(digest: Any, name: str, module: nn.Module, samples: int = 4096) -> None:
    # Up to so many evenly spaced values of each tensor: a hash over gigabytes would take its time.
    for key, tensor in module.state_dict().items():
        flat = tensor.detach().flatten()
        chosen = flat[:: max(1, flat.numel() // samples)].cpu().contiguous()
        digest.update(f"{name} {key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(chosen.view(torch.uint8).numpy().tobytes())


def in_chunks(encode: Callable[[Any], tuple[Tensor, ...]], items: Any, size: int) -> tuple[Tensor, ...]:
    """`encode` over a tensor or list in chunks of exactly `size`, the last one padded with its last item.

    An encoder's bits may depend on its batch size; with one size they do not depend on how images are batched.
    """
    chunks = []
    for start in range(0, len(items), size):
        chunk = items[start : start + size]
        missing = size - len(chunk)
        if isinstance(chunk, Tensor):
            chunk = torch.cat([chunk, chunk[-1:].expand(missing, *chunk.shape[1:])])
        else:
            chunk = [*chunk, *[chunk[-1]] * missing]
        chunks.append(encode(chunk))
    return tuple(torch.cat(parts)[: len(items)] for parts in zip(*chunks, strict=True))


def check_resolution(resolution: int, multiple: int) -> None:
    """Raises a `UserError` unless the resolution is a multiple of what the model works on."""
    if resolution % multiple:
        lower, upper = resolution // multiple * multiple, -(-resolution // multiple) * multiple
        nearest = f"{lower} or {upper}" if lower else f"{upper}"
        raise UserError(f"`--resolution {resolution}` must be a multiple of {multiple} for this model: try {nearest}.")


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Without dropout inside; as it was afterwards."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
