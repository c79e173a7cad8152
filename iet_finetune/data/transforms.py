"""Transforms an RGB image into a square training tensor: resize, crop, flip, scale."""

import numpy as np
import PIL.Image
import torch

from .dataset import TrainingImages

_FILTERS = {
    "nearest": PIL.Image.Resampling.NEAREST,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
    "box": PIL.Image.Resampling.BOX,
    "hamming": PIL.Image.Resampling.HAMMING,
}


class ImageTransform:
    """PIL RGB image -> float32 tensor (3, resolution, resolution) in [-1, 1], as in train_text_to_image.py.

    Args:
        resolution: side of the square in pixels.
        center_crop: crop at the centre; otherwise at a position drawn once per run from (seed, content hash).
        interpolation: Pillow's filter: nearest, bilinear, bicubic, lanczos, box or hamming.
        seed: seed of the crops.
    """

    def __init__(self, resolution: int, *, center_crop: bool, interpolation: str, seed: int) -> None:
        self.resolution = resolution
        self.center_crop = center_crop
        self.interpolation = interpolation
        self.seed = seed

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns (width, height) with the shorter side `resolution` and the longer int(resolution·long/short).

        This is the rounding of torchvision's `Resize`.
        """
        width, height = size
        long = int(self.resolution * max(size) / min(size))
        return (self.resolution, long) if width <= height else (long, self.resolution)

    def crop_offset(self, size: tuple[int, int], content_hash: str) -> tuple[int, int]:
        """Returns (top, left) of the crop in a resized image of `size` (width, height), in pixels.

        Centre: round((length − resolution) / 2), as torchvision's `CenterCrop`. Otherwise each of the
        n = length − resolution + 1 positions is equally likely: with (u₀, u₁) = two 64-bit words of
        `numpy.random.SeedSequence([seed, int(content_hash, 16)])`, top = ⌊u₀·n/2⁶⁴⌋ of the height's n and
        left = ⌊u₁·n/2⁶⁴⌋ of the width's. Nothing else matters, so all processes and passes agree.
        """
        width, height = size
        spare_rows, spare_columns = height - self.resolution, width - self.resolution
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
        size = self.resized(image.size)
        top, left = self.crop_offset(size, content_hash)
        image = image.resize(size, _FILTERS[self.interpolation])
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        if flip:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(pixels)).div_(127.5).sub_(1.0)

    def place(self, size: tuple[int, int], content_hash: str, flip: bool) -> tuple[int, int, int, int]:
        """Returns SDXL's conditions for an image of `size` (width, height): height, width, top and left of the crop.

        The crop is given in the resized image; a mirrored image counts as mirrored before cropping.
        """
        resized = self.resized(size)
        top, left = self.crop_offset(resized, content_hash)
        return size[1], size[0], top, resized[0] - self.resolution - left if flip else left

    def load(self, images: TrainingImages, index: int, flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the tensor of one of the images, and its `place` as (4,) int64.

        Raises:
            UserError: the image cannot be read.
        """
        image, content = images.load(index), images.content_hashes[index]
        return self(image, content, flip), torch.tensor(self.place(image.size, content, flip))

    @property
    def key(self) -> str:
        """Text that differs whenever pixels may: all settings, and the version of Pillow, which resizes."""
        return f"{self.scaling}, crop {self.crop}"

    @property
    def scaling(self) -> str:
        """The part of the key that affects every image."""
        return f"resolution {self.resolution}, {self.interpolation}, Pillow {PIL.__version__}"

    @property
    def crop(self) -> str:
        """The part of the key that affects images with something cut off."""
        return "centre" if self.center_crop else f"seed {self.seed}"

    def is_cut(self, size: tuple[int, int]) -> bool:
        """Whether the crop cuts something off an image of `size` (width, height)."""
        return self.resized(size) != (self.resolution, self.resolution)
