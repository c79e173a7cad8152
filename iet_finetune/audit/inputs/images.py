"""Images as the audit compares them: squares of 8-bit pixels, cropped as in training."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

from ...config.config import Config
from ...config.sizes import Size
from ...data.dataset import TrainingImages
from ...data.hashes import content_hash
from ...data.images import decode_rgb
from ...data.samples import read_file
from ...data.transforms import ImageTransform
from .work import Work


class Pixels(NamedTuple):
    """Images (N, R, R, 3) uint8, in memory or mapped from a file, and a text that differs whenever they may."""

    array: np.ndarray
    key: str

    def __len__(self) -> int:
        return len(self.array)


def digest(texts: Sequence[str]) -> str:
    """A short hash of texts in order."""
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=16).hexdigest()


def training_transform(config: Config, center_crop: bool | None = None) -> ImageTransform:
    """How training resized and cropped its images to squares; `center_crop` overrides the setting."""
    return ImageTransform(
        config.data.resolution,
        center_crop=config.data.center_crop if center_crop is None else center_crop,
        interpolation=config.data.image_interpolation_mode,
        seed=config.training.seed,
    )


def sized_transform(config: Config, size: Size) -> ImageTransform:
    """How training resized and cropped images of one of its sizes, (width, height)."""
    return training_transform(config).at(size)


def as_pixels(transform: ImageTransform, image: PIL.Image.Image, content: str, grey: bool) -> np.ndarray:
    """(H, W, 3) uint8 of an RGB image; grey in all channels if the model has but one."""
    values = transform(image, content, False).permute(1, 2, 0).numpy()
    pixels = np.rint((values + 1) * 127.5).astype(np.uint8)
    if grey:
        pixels = np.asarray(PIL.Image.fromarray(pixels).convert("L").convert("RGB"))
    return pixels


def image_array(
    work: Work, name: str, parts: Sequence[TrainingImages], transform: ImageTransform, grey: bool
) -> Pixels:
    """(N, R, R, 3) uint8, all images of the parts one after the other, mapped from a file.

    Raises:
        UserError: an image cannot be read.
    """
    places = [(part, number) for part in parts for number in range(len(part))]
    hashes = [content for part in parts for content in part.content_hashes]
    limits = [str(part.max_pixels) for part in parts]

    def fill(row: np.ndarray, index: int) -> None:
        part, number = places[index]
        row[:] = as_pixels(transform, part.load(number), hashes[index], grey)

    return _filled(work, name, hashes, transform, grey, fill, limits)


def file_array(work: Work, name: str, files: Sequence[Path], transform: ImageTransform, grey: bool) -> Pixels:
    """(N, R, R, 3) uint8 of image files, mapped from a file.

    Raises:
        UserError: one cannot be read.
    """
    hashes = [content_hash(read_file(str(file))) for file in files]

    def fill(row: np.ndarray, index: int) -> None:
        image = decode_rgb(read_file(str(files[index])), str(files[index]))
        row[:] = as_pixels(transform, image, hashes[index], grey)

    return _filled(work, name, hashes, transform, grey, fill)


def _filled(
    work: Work,
    name: str,
    hashes: Sequence[str],
    transform: ImageTransform,
    grey: bool,
    fill: Callable[[np.ndarray, int], None],
    limits: Sequence[str] = (),
) -> Pixels:
    key, ((width, height),) = digest([*hashes, transform.key, str(grey), *limits]), transform.buckets.sizes
    return Pixels(work.filled(name, {"images": key}, (len(hashes), height, width, 3), fill), key)
