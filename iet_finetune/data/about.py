"""Describes a set of images before training: sizes, what is cut off, and doubts."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from .buckets import Buckets, in_words, shares_outside, targets
from .dataset import TrainingImages


def count_in_words(number: int, among: int, what: str) -> str:
    """`12 (10 distinct)`, or `12` if all are."""
    return f"{number}" if number == among else f"{number} ({among} {what})"


def sizes_in_words(images: TrainingImages) -> str:
    """The smallest and the largest size."""
    if images.sizes is None or not len(images):
        return "of unknown size"
    pixels = images.sizes.astype(np.int64).prod(axis=1)
    least, most = (f"{width} x {height}" for width, height in images.sizes[[pixels.argmin(), pixels.argmax()]])
    return f"{least} pixels" if least == most else f"{least} to {most} pixels"


def shares_cut(images: TrainingImages, buckets: Buckets) -> np.ndarray | None:
    """(N,) the share of each image that cropping takes away; None if sizes are unknown or there are no images."""
    if images.sizes is None or not len(images):
        return None
    return shares_outside(images.sizes, targets(images.sizes, buckets))


def cut_in_words(images: TrainingImages, buckets: Buckets) -> str | None:
    """How much of the images cropping takes away; None if nothing, or if sizes are unknown."""
    shares = shares_cut(images, buckets)
    if shares is None or not shares.any():
        return None
    size = in_words(buckets.sizes[0]) if len(buckets.sizes) == 1 else "their sizes"
    return (
        f"cutting to {size} takes away {shares.mean():.0%} of the pixels, "
        f"{shares.max():.0%} of `{images.names[int(shares.argmax())]}`"
    )


def buckets_in_words(images: TrainingImages, buckets: Buckets, most: int = 6) -> str | None:
    """How many images are brought to which size; None if all have one size, or sizes are unknown."""
    if images.sizes is None or len(buckets.sizes) == 1:
        return None
    numbers = buckets.numbers(images.sizes)
    counts = np.bincount(numbers, minlength=len(buckets.sizes))
    order = [number for number in np.argsort(-counts, kind="stable").tolist() if counts[number]]
    shown = order if len(order) <= most + 1 else order[:most]
    words = ", ".join(f"{counts[number]} of {in_words(buckets.sizes[number])}" for number in shown)
    others = order[len(shown) :]
    rest = f", {counts[others].sum()} of {len(others)} other sizes" if others else ""
    smaller = 0
    if not buckets.upscale:
        smaller = int((replace(buckets, upscale=True).numbers(images.sizes) != numbers).sum())
    less = f"; {smaller} are smaller than the size of their shape, and keep a smaller one" if smaller else ""
    return f"{words}{rest}{less}"


def doubts_of_pixels(images: TrainingImages, buckets: Buckets) -> Iterator[str]:
    """What makes little sense of sizes and brightness, in lines."""
    small = 0
    if images.sizes is not None and len(images):
        small = int((images.sizes * 2 < targets(images.sizes, buckets)).any(axis=1).sum())
    if small:
        (width, height), several = buckets.sizes[0], len(buckets.sizes) > 1
        wanted = f"`--resolution {width}`" if width == height and not several else "the size of their shape"
        yield (
            f"{small} of {len(images)} images are less than half as large as {wanted}: they are enlarged, and the "
            "model learns to draw blurry images"
        )
    if images.narrow is not None and (narrow := int(images.narrow.sum())):
        yield (
            f"{narrow} of {len(images)} images use only a small part of the range from black to white, such as "
            f"`{images.names[int(np.argmax(images.narrow))]}`: check that they look as they should"
        )


def doubts_of_captions(images: TrainingImages) -> Iterator[str]:
    """What makes little sense of captions, in lines."""
    texts = {text.strip() for captions in images.captions for text in captions}
    if texts == {""}:
        yield "every caption is empty: the model learns the empty prompt alone"
    elif "" in texts:
        empty = sum(not any(text.strip() for text in captions) for captions in images.captions)
        yield f"{empty} of {len(images)} images have only an empty caption: `--default_caption` gives them another"
    elif len(texts) == 1 and len(images) > 1:
        yield f"every image has the same caption, {next(iter(texts))!r:.60}: prompts will not tell them apart"
