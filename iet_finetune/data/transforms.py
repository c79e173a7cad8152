"""Transforms an RGB image into a training tensor of one of a few sizes: resize, crop, flip, scale."""

import math
from copy import copy
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch

from ..config.sizes import Size
from .buckets import Buckets
from .dataset import TrainingImages
from .images import DECODING

_FILTERS = {
    "nearest": PIL.Image.Resampling.NEAREST,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
    "box": PIL.Image.Resampling.BOX,
    "hamming": PIL.Image.Resampling.HAMMING,
}
# How many pixels a filter looks at to each side of a point, of the source or, where it shrinks, of the result.
_REACH = {"nearest": 0, "bilinear": 1, "bicubic": 2, "lanczos": 3, "box": 0.5, "hamming": 1}
# An image is elongated if its long side is more than so many times the short one.
_ELONGATED = 4


class _Span(NamedTuple):
    """Pixels of one side of an image, and the place in them that is resized.

    Attributes:
        start, stop: the pixels, with those around that the filter needs.
        begin, end: counted from `start`; small numbers, as Pillow takes them in single precision.
    """

    start: int
    stop: int
    begin: float
    end: float


class ImageTransform:
    """PIL RGB image -> float32 tensor (3, H, W) in [-1, 1], as in train_text_to_image.py.

    Args:
        buckets: the sizes of tensors, of which each image has its own; or the side of a square, for all of them.
        center_crop: crop at the centre; otherwise at a position drawn once per run from (seed, content hash).
        interpolation: Pillow's filter: nearest, bilinear, bicubic, lanczos, box or hamming.
        seed: seed of the crops.
    """

    def __init__(self, buckets: Buckets | int, *, center_crop: bool, interpolation: str, seed: int) -> None:
        self.buckets = Buckets.square(buckets) if isinstance(buckets, int) else buckets
        self.center_crop = center_crop
        self.interpolation = interpolation
        self.seed = seed

    def at(self, size: Size) -> "ImageTransform":
        """The same transform with one size for all images."""
        one = copy(self)
        one.buckets = Buckets((size,))
        return one

    def target(self, size: Size) -> Size:
        """Returns (width, height) of what becomes of an image of `size`."""
        return self.buckets.of(size)

    def resized(self, size: Size) -> Size:
        """Returns (width, height) that cover the `target`: one side is the target's, the other is rounded down.

        This is the rounding of torchvision's `Resize`.
        """
        (width, height), (columns, rows) = size, self.target(size)
        if columns * height >= rows * width:
            return columns, int(columns * height / width)
        return int(rows * width / height), rows

    def crop_offset(self, size: Size, content_hash: str, target: Size | None = None) -> tuple[int, int]:
        """Returns (top, left) of the crop in a resized image of `size` (width, height), in pixels.

        Centre: round((length − side) / 2), as torchvision's `CenterCrop`. Otherwise each of the n = length − side + 1
        positions is equally likely: with (u₀, u₁) = two 64-bit words of
        `numpy.random.SeedSequence([seed, int(content_hash, 16)])`, top = ⌊u₀·n/2⁶⁴⌋ of the height's n and
        left = ⌊u₁·n/2⁶⁴⌋ of the width's. Nothing else matters, so all processes and passes agree.

        Args:
            target: (width, height) of the crop; may be left out where all images have the same.
        """
        columns, rows = target or self.buckets.sizes[0]
        spare_rows, spare_columns = size[1] - rows, size[0] - columns
        if self.center_crop:
            return round(spare_rows / 2), round(spare_columns / 2)
        words = np.random.SeedSequence([self.seed, int(content_hash, 16)]).generate_state(2, np.uint64)
        return int(words[0]) * (spare_rows + 1) >> 64, int(words[1]) * (spare_columns + 1) >> 64

    def __call__(self, image: PIL.Image.Image, content_hash: str, flip: bool) -> torch.Tensor:
        """Returns the tensor of one RGB image, mirrored left to right if `flip`; contiguous, owning its memory.

        Args:
            image: of mode RGB and any size.
            content_hash: hexadecimal digest of the encoded image; determines the random crop.
            flip: mirror after cropping.
        """
        top, left = self.crop_offset(self.resized(image.size), content_hash, self.target(image.size))
        image = self._cropped(image, top, left)
        if flip:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(pixels)).div_(127.5).sub_(1.0)

    def _cropped(self, image: PIL.Image.Image, top: int, left: int) -> PIL.Image.Image:
        """The part at (left, top) of the resized image that is kept.

        Of an elongated image only what that part needs is resized, as all of it may be too large: at 1024 pixels an
        image of 2 x 2000 becomes one of 1024 x 1,024,000. What comes is the same within one of 255 steps, or two in a
        rare pixel where a filter sharpens; but nearest and box may choose the other pixel for a point halfway between
        two, which is a matter of rounding anyway.
        """
        size, (columns, rows) = self.resized(image.size), self.target(image.size)
        if size != image.size and max(image.size) > _ELONGATED * min(image.size):
            return self._resized_part(image, top, left)
        whole = image.resize(size, _FILTERS[self.interpolation])
        return whole.crop((left, top, left + columns, top + rows))

    def _resized_part(self, image: PIL.Image.Image, top: int, left: int) -> PIL.Image.Image:
        (width, height), (kept_columns, kept_rows) = self.resized(image.size), self.target(image.size)
        columns = self._span(image.width, width, left, kept_columns)
        rows = self._span(image.height, height, top, kept_rows)
        part = image.crop((columns.start, rows.start, columns.stop, rows.stop))
        # In the order in which Pillow resizes a whole image of this shape, since it rounds and clips in between.
        for axis in "yx" if image.height > image.width > kept_columns else "xy":
            size, box = (part.width, kept_rows), (0.0, rows.begin, float(part.width), rows.end)
            if axis == "x":
                size, box = (kept_columns, part.height), (columns.begin, 0.0, columns.end, float(part.height))
            part = part.resize(size, _FILTERS[self.interpolation], box)
        return part

    def _span(self, length: int, resized: int, offset: int, kept: int) -> _Span:
        """What of a side of `length` pixels, `resized` when resized, makes the `kept` pixels from `offset` on."""
        scale = length / resized
        begin, end = offset * scale, (offset + kept) * scale
        reach = math.ceil(_REACH[self.interpolation] * max(scale, 1)) + 1
        start, stop = max(math.floor(begin) - reach, 0), min(math.ceil(end) + reach, length)
        return _Span(start, stop, begin - start, min(end, stop) - start)

    def place(self, size: Size, content_hash: str, flip: bool) -> tuple[int, int, int, int]:
        """Returns SDXL's conditions for an image of `size` (width, height): height, width, top and left of the crop.

        The crop is given in the resized image; a mirrored image counts as mirrored before cropping.
        """
        resized, target = self.resized(size), self.target(size)
        top, left = self.crop_offset(resized, content_hash, target)
        return size[1], size[0], top, resized[0] - target[0] - left if flip else left

    def load(self, images: TrainingImages, index: int, flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the tensor of one of the images, and its `place` as (4,) int64.

        Raises:
            UserError: the image cannot be read.
        """
        image, content = images.load(index), images.content_hashes[index]
        return self(image, content, flip), torch.tensor(self.place(image.size, content, flip))

    @property
    def key(self) -> str:
        """Text that differs whenever pixels may: all settings, Pillow's version, and `DECODING`."""
        return f"{self.scaling}, crop {self.crop}"

    @property
    def scaling(self) -> str:
        """The part of the key that affects every image."""
        sizes = [f"{width}" if width == height else f"{width}x{height}" for width, height in self.buckets.sizes]
        return f"resolution {' '.join(sizes)}, {self.interpolation}, Pillow {PIL.__version__}, decoding {DECODING}"

    @property
    def crop(self) -> str:
        """The part of the key that affects images with something cut off."""
        return "centre" if self.center_crop else f"seed {self.seed}"

    def is_cut(self, size: Size) -> bool:
        """Whether the crop cuts something off an image of `size` (width, height)."""
        return self.resized(size) != self.target(size)
