"""Images that show the same thing: equal or mirrored pixels, and near copies of them."""

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .alignment import NOTHING, Placement, align, left

# Changes whenever other images may be found: what was kept of an earlier search is then searched anew.
METHOD = 3
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
# Near copies too: images of which one, moved, scaled, brighter or darker, leaves so little of the other, both made
# small and a little smooth: this share of its variance, and of the mean of a part, and in pixels as above.
MOST_UNEXPLAINED, MOST_LEFT_IN_A_PART = 0.02, 0.04
LEAST_GAIN, MOST_GAIN, MOST_BIAS = 0.6, 1.6, 0.15
# Tried are the most alike in the 8 x 8 grid of grey values, so many and so alike, and in a large set fewer, so that
# there are not more pairs than this: half a millisecond each.
TRIED, LEAST_ALIKE, MOST_PAIRS, LEAST_TRIED = 32, 0.6, 150_000, 3
# At half the size first, and then before they are laid on each other precisely: most different ones leave more.
COARSE, COARSE_UNEXPLAINED, ROUGHLY_UNEXPLAINED = SIDE // 2, 0.08, 0.06
# Moved by less than a pixel, smaller images than this are other images.
LEAST_SIDE = 12
# Pairs that are laid on each other together.
TOGETHER = 256
# (8, 32) fp32: the lowest waves of the orthonormal cosine transform (DCT-II).
_WAVES = np.cos(np.pi / SIDE * np.outer(np.arange(LOW), np.arange(SIDE) + 0.5)).astype(np.float32) * (2 / SIDE) ** 0.5
_WAVES[0] /= 2**0.5
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
    frequencies of the cosine transform of 32 x 32 grey values), by the mean colours of parts, and by pixels; or else
    by pixels again, after one was laid upon the other. So crops, shifts, scales and another brightness are found, as
    long as they are slight.

    Args:
        images: (N, H, W, 3) uint8, may be a np.memmap; read in blocks.
        progress: called with the number of further images that were read; the numbers add up to N.
    """
    seen = _read(images, progress)
    distinct = np.flatnonzero(seen.first == np.arange(len(images)))
    leaders = distinct[_leaders(images, distinct, seen.hashes[distinct], seen.parts[distinct])]
    if len(seen.small):
        leaders = _joined_when_laid_on(images, leaders, distinct, seen.small)
    representative = leaders[np.searchsorted(distinct, seen.first)]
    return Duplicates(representative, len(images) - len(distinct), int((leaders != distinct).sum()))


class _Seen(NamedTuple):
    """What is compared of N images and, along the second dimension, of their mirror images.

    Attributes:
        first: (N,) int64, the first image with the same pixels or the mirrored ones.
        hashes: (N, 2) uint64.
        parts: (N, 2, n) fp32, mean colours of the parts.
        small: (N, 32, 32, 3) uint8, not mirrored; none of images that are smaller still than `LEAST_SIDE`.
    """

    first: np.ndarray
    hashes: np.ndarray
    parts: np.ndarray
    small: np.ndarray


def _read(images: np.ndarray, progress: Callable[[int], None] | None) -> _Seen:
    seen: dict[bytes, int] = {}
    first, hashes = np.empty(len(images), np.int64), np.empty((len(images), 2), np.uint64)
    parts = np.empty((len(images), 2, _part_means(images[:1]).shape[1]), np.float32)
    small = np.empty((len(images) if min(images.shape[1:3]) >= LEAST_SIDE else 0, SIDE, SIDE, 3), np.uint8)
    for start, block in _blocks(images):
        here = slice(start, start + len(block))
        both = (block, np.ascontiguousarray(block[:, :, ::-1]))
        digests = ([hashlib.blake2b(image, digest_size=32).digest() for image in each] for each in both)
        # An image and its mirror image share the smaller digest.
        pairs = enumerate(zip(*digests, strict=True), start)
        first[here] = [seen.setdefault(min(pair), index) for index, pair in pairs]
        for side, each in enumerate(both):
            hashes[here, side], parts[here, side] = _hashes(each), _part_means(each)
        if len(small):
            small[here] = _resized(block)
        if progress is not None:
            progress(len(block))
    return _Seen(first, hashes, parts, small)


def _hashes(images: np.ndarray) -> np.ndarray:
    """(n,) uint64: which of the 64 lowest frequencies stand out above their median."""
    grey = torch.from_numpy(images.mean(axis=3, dtype=np.float32))[:, None]
    small = F.interpolate(grey, (SIDE, SIDE), mode="area")[:, 0].numpy()
    lowest = (_WAVES @ small @ _WAVES.T).reshape(len(images), -1)
    bits = lowest > np.median(lowest, axis=1, keepdims=True) + STANDS_OUT
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _resized(images: np.ndarray) -> np.ndarray:
    """(n, 32, 32, 3) uint8, a little smooth."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32)
    # The mean of what a pixel covers where the image is larger, and between pixels where it is smaller.
    height, width = images.shape[1:3]
    pixels = F.interpolate(pixels, (min(height, SIDE), min(width, SIDE)), mode="area")
    pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False)
    # Sharp edges would not survive being moved by a part of a pixel.
    blur = torch.tensor([1.0, 2.0, 1.0]) / 4
    pixels = F.conv2d(F.pad(pixels, (1, 1, 1, 1), "replicate"), torch.outer(blur, blur).expand(3, 1, 3, 3), groups=3)
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


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


def _joined_when_laid_on(
    images: np.ndarray, leaders: np.ndarray, distinct: np.ndarray, small: np.ndarray
) -> np.ndarray:
    """The leaders of M distinct images, after those that another one explains have joined it with all that they lead.

    Args:
        leaders, distinct: (M,) the leader of each image, and the image itself, among all images.
        small: (N, 32, 32, 3) uint8, all images.
    """
    joined = np.arange(len(images))
    leading, tried = np.unique(leaders), np.zeros(0, np.int64)
    while True:
        pairs = _most_alike(small, leading)
        # As one number each.
        code = (pairs[:, 0] * 2 + pairs[:, 1]) * len(images) + pairs[:, 2]
        fresh = ~np.isin(code, tried)
        tried = np.concatenate((tried, code[fresh]))
        for one, first in _explained(images, small, pairs[fresh]):
            if joined[one] == one and joined[first] == first:
                joined[one] = first
        # Whoever has joined makes room among the most alike: the others may find further ones.
        alone = leading[joined[leading] == leading]
        if len(alone) == len(leading) or len(tried) >= MOST_PAIRS:
            break
        leading = alone
    leaders = joined[leaders]
    while (joined[leaders] != leaders).any():
        leaders = joined[leaders]
    return leaders


def _most_alike(small: np.ndarray, leading: np.ndarray) -> np.ndarray:
    """(n, 3) int64: an image, 1 where it is mirrored, an earlier one that is alike in grey values.

    Args:
        leading: (L,) int64, ascending: the images among which to look.
    """
    plain, mirrored = (_coarse_pattern(each) for each in (small[leading], small[leading][:, :, ::-1]))
    pairs = [np.zeros((0, 3), np.int64)]
    tried = max(LEAST_TRIED, min(TRIED, MOST_PAIRS // max(1, len(leading))))
    rows = max(1, CHUNK // (8 * max(1, len(leading))))
    # The same memory for all blocks: new pieces of it, each a little larger than the last, would leave holes.
    room = torch.empty(rows * 2 * len(leading))
    for start in range(0, len(leading), rows):
        here = slice(start, start + rows)
        earlier = plain[: start + len(plain[here])]
        alike = room[: len(plain[here]) * 2 * len(earlier)].view(-1, 2, len(earlier))
        for place, pattern in enumerate((plain, mirrored)):
            torch.mm(pattern[here], earlier.T, out=alike[:, place])
        later = torch.arange(len(earlier)) >= torch.arange(start, start + len(alike))[:, None]
        alike.masked_fill_(later[:, None], -1.0)
        best = alike.flatten(1).topk(min(tried, 2 * len(earlier)), dim=1)
        row, rank = torch.nonzero(best.values >= LEAST_ALIKE, as_tuple=True)
        side, other = np.divmod(best.indices[row, rank].numpy(), len(earlier))
        pairs.append(np.stack((leading[row.numpy() + start], side, leading[other]), axis=1))
    return np.concatenate(pairs)


def _coarse_pattern(small: np.ndarray) -> Tensor:
    """(n, 64) fp32 of length 1: the grey values of an 8 x 8 grid without their mean; 0 of an image without pattern."""
    grey = torch.from_numpy(small.mean(axis=3, dtype=np.float32)) / 255
    rows = grey.unflatten(1, (LOW, -1)).unflatten(3, (LOW, -1)).mean(dim=(2, 4)).flatten(1)
    pattern = F.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1)
    return pattern.masked_fill(grey.flatten(1).var(dim=1, keepdim=True) < NOTHING, 0.0)


def _explained(images: np.ndarray, small: np.ndarray, pairs: np.ndarray) -> list[list[int]]:
    """The pairs of which one image explains the other: (image, earlier image), ascending."""
    parts = (pairs[start : start + TOGETHER] for start in range(0, len(pairs), TOGETHER))
    found = [_explained_together(images, small, part) for part in parts]
    return np.unique(np.concatenate([np.zeros((0, 2), np.int64), *found]), axis=0).tolist()


def _explained_together(images: np.ndarray, small: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """(n, 2) int64; small grey images are laid on each other first, then small ones in colour, then the whole ones."""
    ours, others = _in_pairs(small, pairs)
    coarse = [F.avg_pool2d(each.mean(dim=1, keepdim=True), SIDE // COARSE) for each in (ours, others)]
    placed = align(coarse[0], coarse[1], Placement.identity(len(pairs)), steps=8)
    grey = [each.mean(dim=1, keepdim=True) for each in (ours, others)]
    rows = torch.nonzero(left(coarse[0], coarse[1], placed).share <= COARSE_UNEXPLAINED)[:, 0]
    roughly = left(grey[0][rows], grey[1][rows], placed.at(rows)).share if len(rows) else rows
    rows = rows[roughly <= ROUGHLY_UNEXPLAINED]
    if len(rows) == 0:
        return np.zeros((0, 2), np.int64)
    ours, others = ours[rows], others[rows]
    placed = align(grey[0][rows], grey[1][rows], placed.at(rows), steps=4)
    over = left(ours, others, placed)
    close = (over.share <= MOST_UNEXPLAINED) & (over.part <= MOST_LEFT_IN_A_PART) & (over.bias.abs() <= MOST_BIAS)
    close &= (over.gain >= LEAST_GAIN) & (over.gain <= MOST_GAIN)
    pairs, placed = pairs[rows[close].numpy()], placed.at(close)
    whole = [
        bool(
            left(*_in_pairs(images, pairs[row : row + 1]), placed.at(torch.tensor([row]))).difference
            <= MOST_DIFFERENCE
        )
        for row in range(len(pairs))
    ]
    return pairs[np.array(whole, bool)][:, [0, 2]]


def _in_pairs(images: np.ndarray, pairs: np.ndarray) -> tuple[Tensor, Tensor]:
    """The images of pairs, (n, 3, H, W) fp32 in [0, 1] each; the first of a pair mirrored where it says so."""
    ours, others = (torch.from_numpy(np.ascontiguousarray(images[pairs[:, column]])) for column in (0, 2))
    ours, others = ours.permute(0, 3, 1, 2), others.permute(0, 3, 1, 2)
    ours = torch.where(torch.from_numpy(pairs[:, 1] == 1)[:, None, None, None], ours.flip(3), ours)
    return ours.to(torch.float32) / 255, others.to(torch.float32) / 255
