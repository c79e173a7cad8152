"""Which images are held out, and which are trained on: random draws by content, of all images at once."""

from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from .columnar import Digests

_HOLD_OUT, _SUBSET = 1, 2  # separate the random draws of the two selections

# Constants of NumPy's `SeedSequence`; its documentation promises that the algorithm stays.
_POOL = 4
_INIT_A, _MULT_A, _INIT_B, _MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
_MIX_L, _MIX_R, _SHIFT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715), np.uint32(16)


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
    """(n, 2) uint64: of each image `SeedSequence([seed, purpose, occurrence, content]).generate_state(2, uint64)`."""
    # The content is a number of 128 bits, of which NumPy takes the lowest 32 first.
    content = hashes.array.view(">u4")[:, ::-1].astype(np.uint32)
    entropy = [*_words(seed), purpose, np.asarray(occurrences, dtype=np.uint32), *content.T]
    states = _states(entropy, len(hashes))
    # NumPy leaves out leading zeros.
    for short in np.flatnonzero(content[:, -1] == 0).tolist():
        parts = [seed, purpose, int(occurrences[short]), int(hashes[short], 16)]
        states[short] = np.random.SeedSequence(parts).generate_state(2, np.uint64)
    return states


def _words(number: int) -> list[int]:
    return [number & 0xFFFFFFFF, *(_words(number >> 32) if number >> 32 else [])]


def _states(entropy: list[int | np.ndarray], count: int) -> np.ndarray:
    """(count, 2) uint64, NumPy's `SeedSequence.generate_state(2, uint64)` for many of them.

    Args:
        entropy: words of 32 bits, four at least, each the same for all or (count,) uint32.
    """
    words = [np.broadcast_to(np.asarray(word, dtype=np.uint32), count) for word in entropy]
    mixed = _Hash(_INIT_A, _MULT_A)
    pool = [mixed(word) for word in words[:_POOL]]
    for source in range(_POOL):
        for place in range(_POOL):
            if place != source:
                pool[place] = _mix(pool[place], mixed(pool[source]))
    for word in words[_POOL:]:
        pool = [_mix(part, mixed(word)) for part in pool]
    out = _Hash(_INIT_B, _MULT_B)
    low_first = [out(part).astype(np.uint64) for part in pool]
    return np.stack(
        [low | high << np.uint64(32) for low, high in zip(low_first[::2], low_first[1::2], strict=True)], 1
    )


class _Hash:
    """`hashmix` of NumPy's `SeedSequence`, whose constant changes with every word."""

    def __init__(self, constant: int, factor: int) -> None:
        self._constant, self._factor = constant, factor

    def __call__(self, words: np.ndarray) -> np.ndarray:
        words = words ^ np.uint32(self._constant)
        self._constant = self._constant * self._factor & 0xFFFFFFFF
        words = words * np.uint32(self._constant)
        return words ^ words >> _SHIFT


def _mix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    mixed: np.ndarray = x * _MIX_L - y * _MIX_R
    return mixed ^ mixed >> _SHIFT
