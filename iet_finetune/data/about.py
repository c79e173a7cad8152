"""What is to be said of a set of images before it is trained on: sizes, what a square cuts off, and doubts."""

from collections.abc import Iterator

import numpy as np

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


def shares_cut(images: TrainingImages) -> np.ndarray | None:
    """(N,) which share of each image is cut off to make it square; None if sizes are not known, or there are none."""
    if images.sizes is None or not len(images):
        return None
    shares: np.ndarray = 1 - images.sizes.min(axis=1) / images.sizes.max(axis=1)
    return shares


def cut_in_words(images: TrainingImages, resolution: int) -> str | None:
    """How much of the images is cut off to make them square; None if nothing is, or sizes are not known."""
    shares = shares_cut(images)
    if shares is None or not shares.any():
        return None
    return (
        f"{shares.mean():.0%} of the pixels are cut off to make {resolution} x {resolution} of them, "
        f"{shares.max():.0%} of `{images.names[int(shares.argmax())]}`"
    )


def doubts_of_pixels(images: TrainingImages, resolution: int) -> Iterator[str]:
    """What makes little sense of sizes and brightness, in lines."""
    if images.sizes is not None and (small := int((images.sizes.min(axis=1) * 2 < resolution).sum())):
        yield (
            f"{small} of {len(images)} images are less than half as large as `--resolution {resolution}`: they are "
            "blown up, and the model learns to draw blurred"
        )
    if images.narrow is not None and (narrow := int(images.narrow.sum())):
        yield (
            f"{narrow} of {len(images)} images fill a small part of the range from black to white, such as "
            f"`{images.names[int(np.argmax(images.narrow))]}`: look at whether they are what they should be"
        )


def doubts_of_captions(images: TrainingImages) -> Iterator[str]:
    """What makes little sense of captions, in lines."""
    texts = {text.strip() for captions in images.captions for text in captions}
    if texts == {""}:
        yield "every caption is empty: the model is trained for the empty prompt alone"
    elif "" in texts:
        empty = sum(not any(text.strip() for text in captions) for captions in images.captions)
        yield f"{empty} of {len(images)} images have an empty caption alone: `--default_caption` gives them another"
    elif len(texts) == 1 and len(images) > 1:
        yield f"every image has the same caption, {next(iter(texts))!r:.60}: prompts will not tell them apart"
