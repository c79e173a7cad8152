"""Sizes to which images of different shapes are brought, and which of them is an image's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..config.settings import DataConfig
from ..config.sizes import Size, named_sizes
from ..errors import UserError
from .dataset import TrainingImages

# From this resolution on, automatic sizes are multiples of so many pixels, as those of SDXL are.
LARGE, LARGE_STEP = 512, 64
# The longer side of an automatic size is at most so many times the shorter one.
LONGEST_ASPECT = 2
# The fewest pixels of an automatic size, as a share of the square's; how far aspect ratios between may be apart.
FEWEST_PIXELS, APART = 0.75, 1.07
# With `--no_upscale`: automatic sizes are also made for resolutions of 7/8, 6/8 ... of the whole.
LEVELS = 8


@dataclass(frozen=True)
class Buckets:
    """Sizes of training images; each image is scaled to cover the one nearest to its shape, and cropped to it.

    Attributes:
        sizes: (width, height) of each, all different.
        upscale: whether images may be enlarged.
        by_shape: how many of the sizes, the first ones, are chosen by shape; None for all. The others are for images
            that are smaller than those and must not be enlarged.
    """

    sizes: tuple[Size, ...]
    upscale: bool = True
    by_shape: int | None = None

    @classmethod
    def square(cls, resolution: int) -> "Buckets":
        """All images become squares of this side."""
        return cls(((resolution, resolution),))

    def numbers(self, sizes: np.ndarray) -> np.ndarray:
        """The number of each image's own size, (N,) int64; -1 if it would have to be enlarged to any, and must not be.

        It is the size whose aspect ratio is nearest by its logarithm. Of several, it is the largest that needs no
        enlargement, else the smallest, else the first. Where enlargement is not allowed and that size needs it, it is
        the largest size that does not; of several the nearest, then the first.

        Args:
            sizes: (N, 2) int, width and height of the images.
        """
        shapes, inverse = np.unique(np.asarray(sizes, np.int64).reshape(-1, 2), axis=0, return_inverse=True)
        own = np.array([self._number(width, height) for width, height in shapes.tolist()], dtype=np.int64)
        return own[inverse.reshape(-1)]

    def of(self, size: Size) -> Size:
        """The own size of an image of `size` (width, height).

        Raises:
            UserError: every one would enlarge it, and it must not be.
        """
        number = self._number(*size)
        if number < 0:
            raise UserError(f"an image of {size[0]} x {size[1]} pixels is smaller than {in_words(self.smallest)}.")
        return self.sizes[number]

    @property
    def smallest(self) -> Size:
        """The size with the fewest pixels."""
        return min(self.sizes, key=lambda size: size[0] * size[1])

    def _number(self, width: int, height: int) -> int:
        return _number(self, width, height) if len(self.sizes) > 1 or not self.upscale else 0


@lru_cache(maxsize=1 << 16)
def _number(buckets: Buckets, width: int, height: int) -> int:
    """As `Buckets.numbers`, of one image."""

    def fits(number: int) -> bool:
        return buckets.sizes[number][0] <= width and buckets.sizes[number][1] <= height

    def area(number: int) -> int:
        return buckets.sizes[number][0] * buckets.sizes[number][1]

    def distance(number: int) -> float:
        # exp |log(a / b)| without logarithms, whose last bits differ between machines.
        across, along = width * buckets.sizes[number][1], height * buckets.sizes[number][0]
        return max(across, along) / min(across, along)

    by_shape, every = range(len(buckets.sizes))[: buckets.by_shape], range(len(buckets.sizes))
    nearest = min(by_shape, key=lambda n: (distance(n), not fits(n), -area(n) if fits(n) else area(n), n))
    if buckets.upscale or fits(nearest):
        return nearest
    return min(filter(fits, every), key=lambda n: (-area(n), distance(n), n), default=-1)


def chosen_buckets(data: DataConfig, multiple: int, longest: int | None = None) -> Buckets:
    """The sizes that the flags ask for: the square of `--resolution` without `--aspect_ratio_buckets`.

    Args:
        multiple: pixels of which sides must be multiples for the model.
        longest: side, in pixels, that it can take; None if there is no limit.

    Raises:
        UserError: the model cannot take a size.
    """
    text, resolution = data.aspect_ratio_buckets, data.resolution
    if text is None:
        return Buckets.square(resolution)
    named = named_sizes(text)
    if named is None:
        step = -(-LARGE_STEP // multiple) * multiple if resolution >= LARGE else multiple
        sizes = automatic_sizes(resolution, step, longest)
        parts = () if data.upscale else range(LEVELS - 1, 0, -1)
        lower = [resolution * part // LEVELS // step * step for part in parts]
        smaller = [size for side in lower for size in automatic_sizes(side, step, longest)]
        if not sizes:
            raise UserError(
                f"`--aspect_ratio_buckets auto`: no multiples of {step} pixels make an image as large as "
                f"`--resolution {resolution}`: raise it."
            )
        return Buckets(tuple(dict.fromkeys((*sizes, *smaller))), data.upscale, by_shape=len(sizes))
    for width, height in named:
        if width % multiple or height % multiple:
            raise UserError(
                f"`--aspect_ratio_buckets {text}`: sides must be multiples of {multiple} for this model, which "
                f"{in_words((width, height))} are not."
            )
        if longest is not None and max(width, height) > longest:
            raise UserError(
                f"`--aspect_ratio_buckets {text}`: {in_words((width, height))} has a side of more than the {longest} "
                "pixels that this model can place."
            )
    return Buckets(named, data.upscale)


def automatic_sizes(resolution: int, step: int, longest: int | None = None) -> tuple[Size, ...]:
    """All (width, height) in multiples of `step` with about resolution² pixels, and not more.

    To each side belongs the longest other one. Where the aspect ratios of these lie far apart, sizes with at least
    3/4 of the pixels come between them. No side is more than twice the other. The squarest size comes first; of each
    pair the wide one.

    Args:
        longest: side in pixels; None for no limit.
    """
    pixels = resolution * resolution
    sides = range(step, min(2 * resolution, longest or 2 * resolution) + 1, step)
    wide = [(width, height) for width in sides for height in sides if height <= width <= LONGEST_ASPECT * height]
    wide = [size for size in wide if FEWEST_PIXELS * pixels <= size[0] * size[1] <= pixels]
    found = [size for size in wide if pixels < max(size[0] * (size[1] + step), (size[0] + step) * size[1])]
    for width, height in sorted(wide, key=lambda size: (-size[0] * size[1], -size[0])):
        if all(max(width * h, height * w) > APART * min(width * h, height * w) for w, h in found):
            found.append((width, height))
    both = {size for width, height in found for size in ((width, height), (height, width))}
    return tuple(sorted(both, key=lambda size: (max(size) / min(size), -size[0] * size[1], -size[0])))


def numbers_of(images: TrainingImages, buckets: Buckets) -> np.ndarray:
    """The number of each image's own size, (N,) int64.

    Raises:
        UserError: images are smaller than every size, and must not be enlarged.
    """
    if len(buckets.sizes) == 1 and buckets.upscale:
        return np.zeros(len(images), dtype=np.int64)
    assert images.sizes is not None  # those of all images that are loaded
    numbers = buckets.numbers(images.sizes)
    if small := np.flatnonzero(numbers < 0).tolist():
        others = f", and {len(small) - 1} others" if len(small) > 1 else ""
        width, height = images.sizes[small[0]].tolist()
        raise UserError(
            f"`{images.names[small[0]]}` ({width} x {height} pixels{others}) is smaller than every size of "
            f"`--aspect_ratio_buckets`, {in_words(buckets.smallest)} at least: leave such images out, or let them be "
            "enlarged without `--no_upscale`."
        )
    return numbers


def size_of(images: TrainingImages, index: int, buckets: Buckets) -> Size:
    """(width, height) of one image as it is trained on."""
    if len(buckets.sizes) == 1:
        return buckets.sizes[0]
    assert images.sizes is not None
    width, height = images.sizes[index].tolist()
    return buckets.of((width, height))


def targets(sizes: np.ndarray, buckets: Buckets) -> np.ndarray:
    """(N, 2) int64, width and height that images of these `sizes` (N, 2) are brought to."""
    return np.array(buckets.sizes, dtype=np.int64)[buckets.numbers(sizes)]


def shares_outside(sizes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(N,) which share of the pixels of each image is cut off when it is scaled to cover what is wanted.

    Args:
        sizes, wanted: (N, 2) int, width and height.
    """
    across = sizes[:, 0] * wanted[:, 1].astype(np.int64)
    along = sizes[:, 1] * wanted[:, 0].astype(np.int64)
    return 1 - np.minimum(across, along) / np.maximum(across, along)


def in_words(size: Size | Sequence[int]) -> str:
    """`832 x 1216`."""
    return f"{size[0]} x {size[1]}"
