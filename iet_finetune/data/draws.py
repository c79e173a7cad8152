"""Which images are held out, and which are trained on: random draws by content, of all images at once."""

from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from .columnar import Digests

_HOLD_OUT, _SUBSET = 1, 2  # separate the random draws of the two selections


def draw_held_out(hashes: Digests, fraction: float, seed: int) -> np.ndarray:
    """(n,) bool, whether each image is held out.

    Contents are held out in random order, each with all its copies, as long as they fit.

    Raises:
        UserError: nothing would be held out, or everything.
    """
    count = len(hashes)
    chosen = np.zeros(count, dtype=bool)
    if fraction == 0:
        return chosen
    target, taken = int(fraction * count + 0.5), 0
    _, firsts, content_of, copies = np.unique(hashes.keys, return_index=True, return_inverse=True, return_counts=True)
    held = np.zeros(len(firsts), dtype=bool)
    order = _in_order(_priorities(hashes.take(firsts), [0] * len(firsts), seed, _HOLD_OUT))
    for content, size in zip(order.tolist(), copies[order].tolist(), strict=True):
        if taken + size <= target:
            held[content] = True
            taken += size
    if taken in (0, count):
        raise UserError(
            f"`--holdout_fraction {fraction}` of {count} images ({len(firsts)} distinct) holds out {taken} "
            f"and leaves {count - taken} to train on: choose another share or add images."
        )
    return held[content_of]


def draw_subset(hashes: Digests, size: int, seed: int) -> np.ndarray:
    """Ascending indices of a random subset; for one seed, smaller subsets are part of larger ones."""
    if size >= len(hashes):
        return np.arange(len(hashes))
    return np.sort(_in_order(_priorities(hashes, _occurrences(hashes), seed, _SUBSET))[:size])


def _in_order(priorities: np.ndarray) -> np.ndarray:
    return np.lexsort((priorities[:, 1], priorities[:, 0]))


def _occurrences(hashes: Digests) -> np.ndarray:
    """(n,) how many earlier images have the same content."""
    _, firsts, content_of = np.unique(hashes.keys, return_index=True, return_inverse=True)
    order = np.argsort(content_of, kind="stable")
    starts = np.searchsorted(content_of[order], np.arange(len(firsts)))
    occurrences = np.empty(len(order), dtype=np.int64)
    occurrences[order] = np.arange(len(order)) - starts[content_of[order]]
    return occurrences


def _priorities(hashes: Digests, occurrences: Sequence[int] | np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """(n, 2) uint64: of each image two words drawn from (seed, purpose, occurrence, content)."""
    words = np.empty((len(hashes), 2), np.uint64)
    for number, (content, occurrence) in enumerate(zip(hashes, occurrences, strict=True)):
        key = [seed, purpose, int(occurrence), int(content, 16)]
        words[number] = np.random.SeedSequence(key).generate_state(2, np.uint64)
    return words
