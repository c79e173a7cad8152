"""How many images an audit works on at once, and on how many between two changes of what is on a GPU."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
# Bytes that a denoiser computes with for each pixel of an image, with and without its prompt. Counted as in
# benchmarks/device_memory.py, these are 650 for Flux, 520 for Stable Diffusion 1.5, 330 for 3 and 320 for XL.
PER_PIXEL = 700
# Bytes of the context and of gaps between the allocator's blocks, and what else of the memory is not counted on.
OF_THE_CARD, SHARE = 10**9, 0.95
# Images whose prompts are encoded before any of them is drawn.
TOGETHER = 64


def images_at_once(asked: int, size: int, weights: int, memory: int) -> int:
    """As many images as are asked for, or as fit on a card, but one at least.

    Args:
        size: side of an image in pixels.
        weights: bytes of the models that are on the card with them.
        memory: bytes of the card.
    """
    room = SHARE * memory - OF_THE_CARD - weights
    return max(1, min(asked, int(room / (PER_PIXEL * size * size))))


def rows_together(batch: int, travels: bool) -> int:
    """How many images, in whole batches, are encoded before the denoiser is put onto the device."""
    return batch * max(1, TOGETHER // batch) if travels else batch


def in_parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """At most so many of them at a time, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
