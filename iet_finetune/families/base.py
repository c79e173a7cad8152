"""What differs between pipelines: how images and prompts are encoded, and how the denoiser is called."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from ..config.config import Config, all_flags
from ..config.settings import DataConfig, ValidationConfig
from ..config.sizes import Size
from ..data.buckets import Buckets, chosen_buckets
from ..errors import UserError
from ..method.objective import NoiseSchedule, Objective
from .fingerprint import pipeline_fingerprint
from .precision import HALF, computing, encoding_dtype, give_back, own_tensors, send

Conditions = dict[str, Tensor]


class Family(ABC):
    """One kind of pipeline. To add one, write a subclass in one file and name it in `families.FAMILIES`.

    Args:
        pipeline: the loaded `DiffusionPipeline`, its models as they are stored. What encodes or predicts is
            put into fp32 before it does.
        config: the run's settings. `--prediction_type` is also written into the saved scheduler.

    Attributes:
        objective: how noise is added, and what the denoiser predicts.
        network: what `predict` calls: the denoiser, or its DDP wrapper where several ranks train it together.
    """

    denoiser_name: ClassVar[str] = "unet"
    # Components used by `encode_images` and `encode_captions`; on the device only while they are needed.
    image_encoders: ClassVar[tuple[str, ...]] = ("vae",)
    caption_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    # How many channels the denoiser must take for each of the VAE's latents; None: that is not checked.
    channels_per_latent: ClassVar[int | None] = None
    # Whether latents are sampled; if not, the standard deviation of `encode_images` is 0 throughout.
    has_posterior: ClassVar[bool] = True
    # Layers that get an adapter by default: the attention projections, as in diffusers' scripts.
    lora_layers: ClassVar[tuple[str, ...]] = ("to_k", "to_q", "to_v", "to_out.0")
    needs_captions: ClassVar[bool] = True
    # Features that flags may need (`needs` in config/flags.py); flags that need another are refused, not ignored.
    features: ClassVar[tuple[str, ...]] = ("noise schedule", "prompts")

    def __init__(self, pipeline: Any, config: Config = Config()) -> None:  # noqa: B008 - frozen
        self.pipeline = pipeline
        self.config = config
        features = (None, *self.features, *(("captions",) if self.needs_captions else ()))
        self.refuse(*(name for name, spec in all_flags().items() if spec.needs not in features))
        self.network: Callable[..., Any] = self.denoiser
        self.objective = self.make_objective()
        # Encoders that are on the device for long -> what they held before.
        self._placed: dict[nn.Module, dict[str, Tensor]] = {}

    def refuse(self, *names: str) -> None:
        """Raises a `UserError` if one of these flags has another value than its default."""
        flags, defaults = self.config.to_flags(), Config().to_flags()
        for name in names:
            if flags[name] != defaults[name]:
                raise UserError(
                    f"`--{name} {flags[name]}` means nothing to a {type(self.pipeline).__name__}: leave it out."
                )

    def make_objective(self) -> Objective:
        """Returns how noise is added; by default the noise schedule of the pipeline's scheduler.

        Raises:
            UserError: the scheduler cannot be trained.
        """
        prediction_type = self.config.model.prediction_type
        scheduler = self.pipeline.scheduler
        if not hasattr(scheduler, "alphas_cumprod"):
            # The settings of such a scheduler (EDM, say) would silently turn into the defaults of DDPM.
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
        """Freezes everything but the denoiser; puts the objective and, if asked, the encoders on the device.

        Args:
            encoders: whether images and captions will be encoded on the device.
        """
        self.freeze()
        for name in (*self.image_encoders, *self.caption_encoders) if encoders else ():
            for encoder in self._encoders((name,)):
                before, dtype = own_tensors(encoder), self.encoding_dtype(name, device)
                send(encoder, device, dtype)
                if dtype != torch.float32:
                    self._placed[encoder] = before
        self.objective = self.objective.to(device)

    def take_back(self) -> None:
        """Gives encoders that compute in half precision the tensors that they came with."""
        for encoder, before in self._placed.items():
            give_back(encoder, before)

    @contextmanager
    def as_it_came(self) -> Iterator[None]:
        """The same inside; afterwards they are on the device again."""
        now = {encoder: own_tensors(encoder) for encoder in self._placed}
        self.take_back()
        try:
            yield
        finally:
            for encoder, tensors in now.items():
                give_back(encoder, tensors)

    def encoding_dtype(self, name: str, device: torch.device) -> torch.dtype:
        """The precision in which an encoder computes there. A VAE is always in fp32: SDXL's gives NaN in fp16."""
        if name not in self.caption_encoders:
            return torch.float32
        half = HALF.get(self.config.training.mixed_precision or "no")
        return encoding_dtype(getattr(self.pipeline, name), device, half)

    def freeze(self) -> None:
        """Freezes everything but the denoiser."""
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(component is self.denoiser).eval()

    @contextmanager
    def lent(self, names: Sequence[str], device: torch.device) -> Iterator[None]:
        """Moves these components to the device, in the precision that they compute in; afterwards they are as before.

        That is fp32 except for text encoders on a GPU; see `encoding_dtype`.
        """
        with ExitStack() as stack:
            for name in names:
                for part in self._encoders((name,)):
                    stack.enter_context(computing(part, device, self.encoding_dtype(name, device)))
            yield

    def drop_encoders(self) -> None:
        """Frees the memory of the encoders, with which nothing can be encoded afterwards; their settings stay."""
        for encoder in self._encoders((*self.image_encoders, *self.caption_encoders)):
            nn.Module.to(encoder, "meta")

    @property
    def beside_denoiser(self) -> list[str]:
        """The other models of `sampling_pipeline`."""
        parts = self.pipeline.components.items()
        models = [name for name, part in parts if isinstance(part, nn.Module) and part is not self.denoiser]
        return [name for name in models if name != "safety_checker"]

    def _encoders(self, names: Sequence[str]) -> list[nn.Module]:
        components = (getattr(self.pipeline, name, None) for name in names)
        return [component for component in components if component is not None]

    @property
    def loads_lora(self) -> bool:
        """Whether the pipeline loads LoRA files; if not, a trained adapter is fused into the weights."""
        return hasattr(self.pipeline, "load_lora_weights")

    @property
    def side_multiple(self) -> int | None:
        """Of how many pixels the sides of an image must be multiples; None if the model takes one size alone."""
        return None

    @property
    def longest_side(self) -> int | None:
        """The longest side of an image in pixels, if there is a limit."""
        return None

    def buckets(self, data: DataConfig) -> Buckets:
        """Returns the sizes that images are trained on at.

        Raises:
            UserError: the model cannot take them.
        """
        if data.aspect_ratio_buckets is None:
            return Buckets.square(data.resolution)
        if self.side_multiple is None:
            raise UserError(
                f"`--aspect_ratio_buckets {data.aspect_ratio_buckets}`: a {type(self.pipeline).__name__} is trained "
                "on squares of `--resolution` alone: leave it out."
            )
        return chosen_buckets(data, self.side_multiple, self.longest_side)

    def latent_shape_of(self, size: Size) -> tuple[int, int, int]:
        """Returns (C, H, W) of the latent of an image of `size` (width, height), one of the `buckets`."""
        if size[0] == size[1] or self.side_multiple is None:
            return self.latent_shape(size[0])
        channels, rows, columns = self.latent_shape(self.side_multiple)
        return channels, rows * size[1] // self.side_multiple, columns * size[0] // self.side_multiple

    @abstractmethod
    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Returns (C, H, W) of a square image's latent; raises a `UserError` if the model cannot take the size."""

    @abstractmethod
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation (B, C, H, W) of the posterior of images (B, 3, R, R) in [-1, 1]."""

    @abstractmethod
    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Returns a scaled sample of the posterior, the denoiser's input before noise; all (B, C, H, W)."""

    def encode_captions(self, captions: Sequence[str]) -> Conditions:
        """Returns the denoiser's conditions for the captions: tensors whose first dimension is the batch."""
        return {}

    @property
    def reader(self) -> tuple[Any, int] | None:
        """The tokenizer of the text encoder that reads the longest captions, and how many tokens that is."""
        return None

    def caption_lengths(self, captions: Sequence[str]) -> tuple[list[int], int] | None:
        """Returns how many tokens captions have that may be too long, and how many are read; None without captions."""
        if self.reader is None:
            return None
        tokenizer, limit = self.reader
        # A token has one byte at least; beginning and end count too. Most captions need not be cut into tokens.
        long = [caption for caption in captions if len(caption.encode()) > limit - 2]
        tokens = tokenizer(long, truncation=False, verbose=False).input_ids if long else []
        return [len(ids) for ids in tokens if len(ids) > limit], limit

    def details(self, sizes: Tensor, labels: Tensor) -> Conditions:
        """Returns further conditions of each image, in the form of `encode_captions`.

        Args:
            sizes: (B, 6) int64: height and width of the stored image, top and left of the crop in the resized image,
                which is mirrored before cropping if it is mirrored, height and width of the crop.
            labels: (B,) int64, the class; 0 without `--class_column`.
        """
        return {}

    @abstractmethod
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Returns the denoiser's prediction (B, C, H, W); `timesteps` (B,) int64 are those of `objective`."""

    def take_classes(self, names: tuple[str, ...] | None, highest: int) -> None:
        """Sets the classes of the images, before training and sampling.

        Args:
            names: class names by number; None without `--class_column`.
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
        """Returns the prompts of the validation images, which are also their captions; empty: draw none."""
        return validation.validation_prompts

    def draw(
        self, pipeline: Any, prompt: str, generators: list[torch.Generator], validation: ValidationConfig, size: int
    ) -> list[Image.Image]:
        """Returns one square image per generator for one of the `prompts`; `pipeline` is `sampling_pipeline()`."""
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
        """Further arguments of the pipeline's call, so that it samples as it was trained."""
        return {}

    def fingerprint(self) -> str:
        """Returns a hash of all models' weights and the scheduler's settings."""
        return pipeline_fingerprint(self.pipeline)

    def sampling_pipeline(self) -> Any:
        """Returns the current pipeline for sampling during training: without safety checker and progress bar."""
        components = dict(self.pipeline.components)
        if "safety_checker" in components:
            components |= {"safety_checker": None, "requires_safety_checker": False}
        pipeline = type(self.pipeline)(**components)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def in_chunks(encode: Callable[[Any], tuple[Tensor, ...]], items: Any, size: int) -> tuple[Tensor, ...]:
    """Applies `encode` to a tensor or list in chunks of exactly `size`, padding the last chunk with its last item.

    An encoder's bits may depend on its batch size. With one size they do not depend on how images are batched.
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
    """Puts the module into eval mode, and back afterwards."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
