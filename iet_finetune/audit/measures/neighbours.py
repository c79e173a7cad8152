"""The nearest training images of generated ones: exactly in pixels, by cosine similarity in features."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes for what a search needs besides its inputs and its results, whatever their sizes.
WORKSPACE = 256 * 10**6
# More rows than these at a time make nothing faster.
MOST_ROWS = 1536
CPU = torch.device("cpu")


class Neighbours(NamedTuple):
    """The k nearest references of each of G images.

    Attributes:
        index: (G, k) int64, nearest first; of equally near ones the lower index first.
        distance: (G, k) float64, squared Euclidean distance of the pixels in [0, 1], summed over the image.
        flipped: (G, k) bool, whether the image is nearer when it is mirrored left to right.
    """

    index: np.ndarray  # type: ignore[assignment]  # a tuple's method of this name is of no use here
    distance: np.ndarray
    flipped: np.ndarray


class SimilarFeatures(NamedTuple):
    """The k most similar references of each of G images.

    Attributes:
        index: (G, k) int64, the most similar first; of equally similar ones the lower index first.
        similarity: (G, k) float64, cosine similarity.
        flipped: (G, k) bool, whether the image is more similar when it is mirrored left to right.
    """

    index: np.ndarray  # type: ignore[assignment]  # a tuple's method of this name is of no use here
    similarity: np.ndarray
    flipped: np.ndarray


def nearest_pixels(
    generated: np.ndarray,
    references: np.ndarray,
    k: int = 50,
    *,
    flips: bool = True,
    device: torch.device = CPU,
    progress: Callable[[int], None] | None = None,
) -> Neighbours:
    """The k nearest references of each image, exactly: the distances are the integers of a search one by one, / 255^2.

    With x split at its vertical middle into halves l and r, r mirrored, let s = l + r and a = l - r. Then
    g.x = (s.s' + a.a') / 2, and mirroring g changes the sign of a.a' alone: one product for both orientations. It is
    computed in float64, where every partial sum is an integer below 2^53. So nothing is rounded, in whatever order a
    BLAS adds, on a CPU or with CUDA, and |g|^2 + |x|^2 - 2 g.x cancels without loss.

    Args:
        generated: (G, H, W, 3) uint8, may be a np.memmap; read in blocks.
        references: (N, H, W, 3) uint8, likewise.
        k: how many, at most N.
        flips: compare each image mirrored as well; the nearer orientation counts.
        device: where to compute. Other devices than CPUs and CUDA's may lack float64; the CPU does their work.
        progress: called with the number of further images that are done; the numbers add up to G.

    Raises:
        ValueError: images of different sizes or another type, or k beyond N.
    """
    if generated.shape[1:] != references.shape[1:] or not generated.dtype == references.dtype == np.uint8:
        kinds = [f"{images.dtype} of shape {images.shape[1:]}" for images in (generated, references)]
        raise ValueError(f"images must be uint8 and of one size, not {' and '.join(kinds)}")
    _check_count(k, len(references))
    device = device if device.type == "cuda" else CPU
    size, _ = _plan(generated.shape[1:])
    found = [
        _nearest_of_block(generated[start : start + size], references, k, flips, device, progress or _silent)
        for start in range(0, len(generated), size)
    ]
    index, distance, flipped = _stacked(found, k)
    return Neighbours(index, distance / 255**2, flipped)


def nearest_features(
    generated: np.ndarray,
    mirrored: np.ndarray | None,
    references: np.ndarray,
    k: int = 1,
    *,
    device: torch.device = CPU,
    rows: int = MOST_ROWS,
) -> SimilarFeatures:
    """The k references with the most similar features, by cosine similarity in float64.

    Args:
        generated: (G, D) floating-point features, normalised here; a vector of zeros has similarity 0 to all.
        mirrored: (G, D) those of the same images mirrored left to right, or None; the more similar orientation counts.
        references: (N, D).
        k: how many, at most N.
        device: as for `nearest_pixels`.
        rows: of generated images and of references that are compared at a time.

    Raises:
        ValueError: k beyond N.
    """
    _check_count(k, len(references))
    device = device if device.type == "cuda" else CPU
    found = []
    for start in range(0, len(generated), rows):
        ours = _normalised(generated[start : start + rows], device)
        turned = None if mirrored is None else _normalised(mirrored[start : start + rows], device)
        best = _Best(len(ours), k, device)
        for place in range(0, len(references), rows):
            theirs = _normalised(references[place : place + rows], device).T
            # The clamp is for the last bit: nothing is more alike than the same.
            alike = (ours @ theirs).clamp_(-1, 1)
            lean = torch.zeros_like(alike)
            if turned is not None:
                other = (turned @ theirs).clamp_(-1, 1)
                lean = alike - other
                alike = torch.maximum(alike, other)
            best.take(alike.neg_(), lean, place)
        found.append(best)
    index, unlike, flipped = _stacked(found, k)
    return SimilarFeatures(index, -unlike, flipped)


class _Best:
    """The k nearest so far of each image of a block, while references come in the order of their indices."""

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.far = torch.full((rows, k), math.inf, dtype=torch.float64, device=device)
        self.index = torch.zeros((rows, k), dtype=torch.int64, device=device)
        self.flipped = torch.zeros((rows, k), dtype=torch.bool, device=device)

    def take(self, far: Tensor, lean: Tensor, start: int) -> None:
        """Takes the next references into account.

        Args:
            far: (rows, n) their distances.
            lean: (rows, n) negative where the mirrored image is the nearer one.
            start: index of the first of them.
        """
        rows, columns = self._candidates(far)
        if len(rows) == 0:
            return
        counts = torch.bincount(rows, minlength=len(far))
        places = (rows, torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows])
        width = int(counts.max())

        def joined(kept: Tensor, new: Tensor, fill: float) -> Tensor:
            beside = kept.new_full((len(kept), width), fill)
            beside[places] = new
            return torch.cat((kept, beside), dim=1)

        all_far = joined(self.far, far[rows, columns], math.inf)
        index = joined(self.index, columns + start, 0)
        flipped = joined(self.flipped, lean[rows, columns] < 0, 0)
        # Stable, and by ascending index before: of equals the lower index stays in front.
        order = all_far.sort(dim=1, stable=True).indices[:, : self.far.shape[1]]
        self.far, self.index, self.flipped = (each.gather(1, order) for each in (all_far, index, flipped))

    def _candidates(self, far: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of what may be among the k nearest, in ascending order."""
        rows, k = self.far.shape
        # An equal distance at a higher index does not displace the last.
        near = far < self.far[:, -1:]
        if int(near.sum()) > 4 * rows * k:
            near &= far <= far.topk(min(k, far.shape[1]), dim=1, largest=False).values[:, -1:]
        where = near.nonzero()
        return where[:, 0], where[:, 1]


class _Halves:
    """A block of images as sums and differences of their left and mirrored right halves, strip by strip."""

    def __init__(self, images: np.ndarray, strips: Sequence[slice], device: torch.device) -> None:
        self.images, self.strips, self.device = images, strips, device
        # Small images are one strip, which is made once; of larger ones only a strip at a time has room.
        self.kept = self._made(strips[0]) if len(strips) == 1 else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """By strip: sums (n, a) and differences (n, b), float64."""
        for strip in self.strips:
            yield self.kept or self._made(strip)

    def squares(self) -> Tensor:
        """(n,) float64, the sum of every image's squared pixels."""
        total = torch.zeros(len(self.images), dtype=torch.float64, device=self.device)
        for halves in self:
            for values in halves:
                total += torch.linalg.vecdot(values, values) / 2
        return total

    def _made(self, strip: slice) -> tuple[Tensor, Tensor]:
        values = torch.from_numpy(np.array(self.images[:, strip])).to(self.device, torch.int16)
        width, half = values.shape[2], values.shape[2] // 2
        left, middle, right = values[:, :, :half], values[:, :, half : width - half], values.flip(2)[:, :, :half]
        # A middle column is its own mirror image and, like a pair, has to count twice.
        sums = torch.cat((left + right, middle, middle), dim=2)
        return sums.flatten(1).double(), (left - right).flatten(1).double()


def _nearest_of_block(
    generated: np.ndarray,
    references: np.ndarray,
    k: int,
    flips: bool,
    device: torch.device,
    progress: Callable[[int], None],
) -> _Best:
    """The k nearest of a block of images; `far` are squared distances of pixels from 0 to 255."""
    size, strips = _plan(generated.shape[1:])
    best, ours = _Best(len(generated), k, device), _Halves(generated, strips, device)
    squares = ours.squares()[:, None]
    for start in range(0, len(references), size):
        theirs = _Halves(references[start : start + size], strips, device)
        shape = (len(generated), len(theirs.images))
        same, opposite = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        for (sums, differences), (other_sums, other_differences) in zip(ours, theirs, strict=True):
            same.addmm_(sums, other_sums.T)
            opposite.addmm_(differences, other_differences.T)
        same += opposite.abs() if flips else opposite
        far = torch.sub(theirs.squares(), same, out=same).add_(squares)
        best.take(far, opposite if flips else torch.zeros_like(far), start)
        end = start + shape[1]
        progress(len(generated) * end // len(references) - len(generated) * start // len(references))
    return best


def _plan(shape: tuple[int, ...]) -> tuple[int, list[slice]]:
    """How many images (H, W, 3) make a block, and the rows of pixels that make a strip, so that WORKSPACE suffices."""
    height, line = shape[0], 3 * shape[1]
    # Half for a block's distances, 48 bytes each with what sorting takes; half for the strips of two blocks, 16 bytes
    # a number and 12 while they are made.
    room = WORKSPACE // 2
    size = max(1, min(MOST_ROWS, math.isqrt(room // 48), room // (28 * line)))
    lines = max(1, room // (28 * line * size))
    return size, [slice(start, start + lines) for start in range(0, height, lines)]


def _normalised(features: np.ndarray, device: torch.device) -> Tensor:
    """(n, D) float64 of length 1, or 0."""
    return F.normalize(torch.from_numpy(np.array(features)).to(device, torch.float64), dim=1)


def _stacked(found: Sequence[_Best], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index, distance and flipped of all blocks, each (G, k)."""
    found = found or [_Best(0, k, CPU)]
    index, far, flipped = (
        torch.cat([getattr(best, name) for best in found]).cpu().numpy() for name in ("index", "far", "flipped")
    )
    return index, far, flipped


def _silent(count: int) -> None:
    """Tells nobody."""


def _check_count(k: int, references: int) -> None:
    if not 1 <= k <= references:
        raise ValueError(f"k = {k} nearest of {references} references cannot be had")
