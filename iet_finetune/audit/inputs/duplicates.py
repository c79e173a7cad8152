"""Training images that show the same thing: equal or mirrored pixels, and near copies of them."""

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dctn

# Near copies: hashes that differ in so many of 64 bits at most ...
MOST_BITS = 4
# ... pixels in [0, 1] whose difference has at most this root mean square ...
MOST_DIFFERENCE = 0.08
# ... and parts of an 8 x 8 grid whose mean colours, in [0, 1], differ by so much at most. Compression and noise are
# all over an image, but clock faces with another hour, or faces with another mouth, differ in one place.
MOST_IN_A_PART = 0.06
# Side of the grey image whose cosine transform is hashed, and of the corner of low frequencies that is kept, as of
# the grid.
SIDE, LOW = 32, 8
# A coefficient has to stand out by this much, of grey values from 0 to 255. About half of a symmetric image's
# coefficients are 0, and so is their median: without this the least noise would throw those bits about.
STANDS_OUT = 8.0
# Bytes that are looked at together.
CHUNK = 32 * 10**6


class Duplicates(NamedTuple):
    """Which training images show the same thing.

    Attributes:
        representative: (N,) int64, the index of the first image of the group that an image belongs to; its own where
            it is that one.
        exact: how many images have the pixels, as they are or mirrored left to right, of an earlier one.
        near: how many others belong to the group of an earlier one.
    """

    representative: np.ndarray
    exact: int
    near: int

    @property
    def references(self) -> np.ndarray:
        """(R,) int64, ascending: the first image of each group. R = N - exact - near."""
        return np.unique(self.representative)

    @property
    def repeats(self) -> np.ndarray:
        """(R,) int64, how many images each group has, in the order of `references`."""
        return np.unique(self.representative, return_counts=True)[1]


def find_duplicates(images: np.ndarray, progress: Callable[[int], None] | None = None) -> Duplicates:
    """Groups images that show the same thing, each with the first image of its group, in the order of their indices.

    An image joins the first group whose first image has the same pixels, as they are or mirrored; or else the first
    one whose first image is a near copy of it or of its mirror image: by perceptual hash (the signs of the lowest
    frequencies of the cosine transform of 32 x 32 grey values), by the mean colours of parts, and by pixels.

    Args:
        images: (N, H, W, 3) uint8, may be a np.memmap; read in blocks.
        progress: called with the number of further images that were read; the numbers add up to N.
    """
    first, hashes, parts = _read(images, progress)
    distinct = np.flatnonzero(first == np.arange(len(images)))
    leaders = distinct[_leaders(images, distinct, hashes[distinct], parts[distinct])]
    representative = leaders[np.searchsorted(distinct, first)]
    return Duplicates(representative, len(images) - len(distinct), int((leaders != distinct).sum()))


def _read(images: np.ndarray, progress: Callable[[int], None] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each image and, along the second dimension, of its mirror image what is compared.

    Returns:
        (N,) int64, the first image with the same pixels or the mirrored ones; (N, 2) uint64 hashes; (N, 2, n) fp32
        mean colours of the parts.
    """
    seen: dict[bytes, int] = {}
    first, hashes = np.empty(len(images), np.int64), np.empty((len(images), 2), np.uint64)
    parts = np.empty((len(images), 2, _part_means(images[:1]).shape[1]), np.float32)
    for start, block in _blocks(images):
        here = slice(start, start + len(block))
        both = (block, np.ascontiguousarray(block[:, :, ::-1]))
        digests = ([hashlib.blake2b(image, digest_size=32).digest() for image in each] for each in both)
        # An image and its mirror image share the smaller digest.
        pairs = enumerate(zip(*digests, strict=True), start)
        first[here] = [seen.setdefault(min(pair), index) for index, pair in pairs]
        for side, each in enumerate(both):
            hashes[here, side], parts[here, side] = _hashes(each), _part_means(each)
        if progress is not None:
            progress(len(block))
    return first, hashes, parts


def _hashes(images: np.ndarray) -> np.ndarray:
    """(n,) uint64: which of the 64 lowest frequencies stand out above their median."""
    grey = torch.from_numpy(images.mean(axis=3, dtype=np.float32))[:, None]
    small = F.interpolate(grey, (SIDE, SIDE), mode="area")[:, 0].numpy()
    lowest = dctn(small, axes=(1, 2), norm="ortho")[:, :LOW, :LOW].reshape(len(images), -1)
    bits = lowest > np.median(lowest, axis=1, keepdims=True) + STANDS_OUT
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _part_means(images: np.ndarray) -> np.ndarray:
    """(n, up to 192) fp32: mean colours, in [0, 1], of the parts of an 8 x 8 grid."""
    height, width = images.shape[1:3]
    rows, columns = (np.unique(np.arange(LOW) * side // LOW) for side in (height, width))
    sums = np.add.reduceat(np.add.reduceat(images, rows, axis=1, dtype=np.float32), columns, axis=2)
    sizes = np.outer(np.diff(rows, append=height), np.diff(columns, append=width))[:, :, None]
    return (sums / (255 * sizes)).reshape(len(images), 3 * sizes.size).astype(np.float32)


def _leaders(images: np.ndarray, distinct: np.ndarray, hashes: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """(M,) the place among the M distinct images of the first of each one's group of near copies."""
    leader = np.arange(len(distinct))
    rows = max(1, CHUNK // (16 * max(1, len(distinct))))
    for start in range(0, len(distinct), rows):
        stop = min(start + rows, len(distinct))
        earlier = np.flatnonzero(leader[:stop] == np.arange(stop))
        apart = np.bitwise_count(hashes[start:stop, :, None] ^ hashes[earlier, 0])
        # Much faster than `nonzero` where hardly any are.
        alike = np.flatnonzero(apart <= MOST_BITS)
        place, side, other = np.unravel_index(alike, apart.shape)
        pairs = np.stack((place + start, side, earlier[other]), axis=1)
        for one, _, first in _close(images, distinct, parts, pairs[pairs[:, 2] < pairs[:, 0]]):
            # A leader of this block may have joined another since the pairs were made.
            if leader[one] == one and leader[first] == first:
                leader[one] = first
    return leader


def _close(images: np.ndarray, distinct: np.ndarray, parts: np.ndarray, pairs: np.ndarray) -> list[list[int]]:
    """The pairs that are close in their parts and their pixels, by ascending image, then by ascending leader.

    Args:
        pairs: (n, 3) int64: place of an image, 1 where it is mirrored, place of a possible leader.
    """
    limit = (255 * MOST_DIFFERENCE) ** 2 * images[0].size

    def close_in_parts(place: np.ndarray, side: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.abs(parts[place, side] - parts[other, 0]).max(axis=1) <= MOST_IN_A_PART

    def close_in_pixels(place: np.ndarray, side: np.ndarray, other: np.ndarray) -> np.ndarray:
        ours = np.array(images[distinct[place]])
        ours[side == 1] = ours[side == 1, :, ::-1]
        difference = ours.astype(np.int32) - images[distinct[other]]
        return (difference**2).sum(axis=(1, 2, 3), dtype=np.int64) <= limit

    pairs = _passing(pairs, 8 * parts[0, 0].size, close_in_parts)
    pairs = _passing(pairs, 10 * images[0].size, close_in_pixels)
    return pairs[np.lexsort((pairs[:, 2], pairs[:, 0]))].tolist()


def _passing(pairs: np.ndarray, size: int, test: Callable[..., np.ndarray]) -> np.ndarray:
    """The pairs that pass a test, which sees so many at a time that a CHUNK holds `size` bytes for each."""
    count = max(1, CHUNK // size)
    passed = [test(*pairs[start : start + count].T) for start in range(0, len(pairs), count)]
    return pairs[np.concatenate(passed)] if passed else pairs


def _blocks(images: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The images in memory, block by block, each with the index of its first."""
    count = max(1, CHUNK // (10 * max(1, images[:1].size)))
    for start in range(0, len(images), count):
        yield start, np.array(images[start : start + count])
