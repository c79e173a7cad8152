"""Pixel-space denoisers: a UNet2DModel without text, with or without classes."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from PIL import Image
from torch import Tensor

from ..config.config import Config
from ..config.flags import nearest
from ..config.settings import ValidationConfig
from ..config.sizes import Size
from ..errors import UserError
from .base import Conditions, Family, check_resolution
from .pipelines import ClassConditionalPipeline

# Number of classes sampled during training if the user names none.
FIRST_CLASSES = 8


class Unconditional(Family):
    """`DDPMPipeline` and `DDIMPipeline`, predicting the noise, v or the image, according to the scheduler.

    Images are not encoded: they are the latents. A one-channel model is trained on grey images.

    Raises:
        UserError: the UNet2DModel's output channels differ from those of the image, or it takes embeddings of classes.
    """

    image_encoders = ()
    caption_encoders = ()
    has_posterior = False
    needs_captions = False
    features = ("noise schedule",)

    def __init__(self, pipeline: Any, config: Config = Config()) -> None:  # noqa: B008 - frozen
        super().__init__(pipeline, config)
        self._class_names: tuple[str, ...] | None = None
        unet = self.pipeline.unet.config
        if unet.in_channels not in (1, 3) or unet.out_channels != unet.in_channels:
            raise UserError(
                f"the UNet takes {unet.in_channels} channels and gives {unet.out_channels}: only 1 and 1 (grey), or 3 "
                "and 3 (colour), can be trained."
            )
        if unet.class_embed_type == "identity":
            raise UserError("the UNet takes embeddings of classes instead of classes, which cannot be trained.")

    @property
    def takes_classes(self) -> bool:
        """Whether the UNet is class-conditional."""
        unet = self.pipeline.unet.config
        return unet.num_class_embeds is not None or unet.class_embed_type is not None

    def take_classes(self, names: tuple[str, ...] | None, highest: int) -> None:
        """As `Family.take_classes`; a class-conditional model requires classes."""
        if not self.takes_classes:
            return super().take_classes(names, highest)
        if names is None:
            raise UserError("the model draws by class: say with `--class_column COLUMN` which class each image is of.")
        count = self.pipeline.unet.config.num_class_embeds
        if count is not None and highest >= count:
            raise UserError(
                f"`--class_column {self.config.data.class_column}` has class {highest}, but the model knows {count}: "
                f"0 to {count - 1}."
            )
        self._class_names = names
        return None

    @property
    def side_multiple(self) -> int:
        """What the UNet's downsampling divides sides by."""
        return 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)

    def latent_shape_of(self, size: Size) -> tuple[int, int, int]:
        """Returns (C, H, W) of an image of `size` (width, height)."""
        return self.pipeline.unet.config.in_channels, size[1], size[0]

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Returns (C, R, R); R must be the UNet's own size."""
        unet = self.pipeline.unet.config
        check_resolution(resolution, self.side_multiple)
        own = unet.sample_size
        own = [own, own] if isinstance(own, int) else list(own or [])
        if own != [resolution, resolution]:
            raise UserError(
                f"`--resolution {resolution}` is not the size of the images that this model generates: "
                f"{'its configuration gives none' if not own else ' x '.join(map(str, own))}."
            )
        return unet.in_channels, resolution, resolution

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the pixels, grey for a one-channel model, and zeros."""
        if self.pipeline.unet.config.in_channels == 1:
            red, green, blue = pixel_values.split(1, dim=1)
            # ITU-R BT.601 luma, written so that equal channels give exactly that channel.
            pixel_values = green + 0.299 * (red - green) + 0.114 * (blue - green)
        return pixel_values, torch.zeros_like(pixel_values)

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Returns the pixels."""
        return mean

    def details(self, sizes: Tensor, labels: Tensor) -> Conditions:
        """Returns the class, for a class-conditional model."""
        return {"class_labels": labels} if self.takes_classes else {}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Returns the UNet's output for (x_t, t) and, if it takes one, the class."""
        return self.network(noisy_latents, timesteps, **conditions, return_dict=False)[0]

    def prompts(self, validation: ValidationConfig) -> tuple[str, ...]:
        """Returns one empty prompt without classes; else the names of the classes to sample, by default the first 8.

        Raises:
            UserError: the model takes no prompts, or a class is not in the data.
        """
        chosen, names = validation.validation_prompts, self._class_names
        if names is None:
            if chosen:
                raise UserError(f"`--validation_prompts {chosen[0]}`: this model takes no prompts: leave it out.")
            return ("",)
        for name in chosen:
            if name not in names:
                raise UserError(
                    f"`--validation_prompts {name}` is no class in `--class_column "
                    f"{self.config.data.class_column}`.{nearest(name, names) or _listed(names)}"
                )
        return chosen or names[: min(FIRST_CLASSES, self._known)]

    @property
    def _known(self) -> int:
        return self.pipeline.unet.config.num_class_embeds or FIRST_CLASSES

    def draw(
        self, pipeline: Any, prompt: str, generators: list[torch.Generator], validation: ValidationConfig, size: int
    ) -> list[Image.Image]:
        """Returns one RGB image per generator, sampled with DDIM."""
        labels: Any = len(generators)
        if self._class_names is not None:
            labels = [self._class_names.index(prompt)] * len(generators)
        steps = validation.validation_inference_steps
        images = pipeline(labels, num_inference_steps=steps, generator=generators).images
        return [image.convert("RGB") for image in images]

    def sampling_pipeline(self) -> Any:
        """Returns a DDIM pipeline, class-conditional if the model is."""
        kind: Any = ClassConditionalPipeline if self.takes_classes else DDIMPipeline
        scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        pipeline = kind(unet=self.pipeline.unet, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def fingerprint(self) -> str:
        """As `Family.fingerprint`, with the UNet's settings: from scratch, its dropout is a setting of the run."""
        settings = {key: value for key, value in self.pipeline.unet.config.items() if not key.startswith("_")}
        text = super().fingerprint() + json.dumps(settings, default=str, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _listed(names: Sequence[str], most: int = 10) -> str:
    return f" It has {', '.join(names[:most])}{', ...' if len(names) > most else ''}."
