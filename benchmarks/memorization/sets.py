"""The data sets: images of which some are repeated, as exact or as near copies, and held-out ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from .copies import near_copy
from .sources import Pictures, emoji, fluent_emoji, garments

ONCE, EXACT, NEAR = "once", "exact", "near"
# How many images of each kind of copies are in the data how often: a long tail.
LONG_TAIL = {2: 4, 5: 3, 10: 2, 20: 1, 50: 1}
# How many images are in it once.
ONCES = 100
# Sets without repeats, of so many images each, and one that is trained on for much longer than it takes to be best;
# these ask one thing alone.
UNIQUE, FEW, LONG = "garments-unique", "garments-few", "text-to-image-long"
UNIQUES = {UNIQUE: 200, FEW: 60}


@dataclass(frozen=True)
class EvidenceSet:
    """What one set of runs is trained on and judged by. An *original* is a training image before it is repeated.

    Attributes:
        rows: the training images, copies included; PIL, of one size.
        captions, labels: (rows,) of each.
        origin: (rows,) int64, the number of the original that a row is a copy of.
        kind: (originals,) str: `once`, `exact` or `near`.
        repeats: (originals,) int64, how many rows each has.
        quality: held-out images, 1,000 at least, that samples are compared with.
        seen: other held-out images that training may see.
    """

    rows: list[Image.Image]
    captions: np.ndarray
    labels: np.ndarray
    origin: np.ndarray
    kind: np.ndarray
    repeats: np.ndarray
    quality: Pictures
    seen: Pictures

    @property
    def firsts(self) -> np.ndarray:
        """(originals,) int64: the row of each original itself, the first of its rows."""
        return np.unique(self.origin, return_index=True)[1]

    def dataset(self, rows: np.ndarray | None = None) -> Dataset:
        """The training images as the trainer takes them; some of the rows, or all."""
        rows = np.arange(len(self.rows)) if rows is None else rows
        return table(Pictures(self.rows, self.captions, self.labels).at(rows))


def build(
    pictures: Pictures,
    once: int,
    quality: Pictures,
    seen: Pictures,
    *,
    size: int,
    seed: int,
    tail: Mapping[int, int] = LONG_TAIL,
) -> EvidenceSet:
    """Repeats some of the images and makes all of them small.

    Args:
        pictures: to choose from; the seed decides which are trained on and which are repeated.
        once: how many are in the data once.
        size: of the images, in pixels.
        tail: how many images of each kind of copies are in the data how often.
    """
    rng = np.random.default_rng([seed, 17])
    # Without duplicates: an image that is in the data twice by nature would be called unique.
    times_each = [times for times, count in tail.items() for _ in range(count)]
    kinds = np.array([*[ONCE] * once, *[EXACT] * len(times_each), *[NEAR] * len(times_each)])
    repeats = np.array([*[1] * once, *times_each, *times_each])
    chosen = pictures.at(rng.permutation(len(pictures.images))[: len(kinds)])
    rows, origin = [], []
    for number, (image, kind, times) in enumerate(zip(chosen.images, kinds, repeats, strict=True)):
        copies = [near_copy(image, rng) if kind == NEAR else image for _ in range(times - 1)]
        rows += [small(each, size) for each in (image, *copies)]
        origin += [number] * times
    return EvidenceSet(
        rows=rows,
        captions=chosen.captions[origin],
        labels=chosen.labels[origin],
        origin=np.array(origin),
        kind=kinds,
        repeats=repeats,
        quality=quality._replace(images=[small(each, size) for each in quality.images]),
        seen=seen._replace(images=[small(each, size) for each in seen.images]),
    )


def table(pictures: Pictures) -> Dataset:
    """Images as the trainer takes them, with the columns `image`, `text` and `label`."""
    features = Features({"image": ImageFeature(), "text": Value("string"), "label": Value("int64")})
    captions = [str(caption) for caption in pictures.captions]
    columns = {"image": pictures.images, "text": captions, "label": pictures.labels.tolist()}
    return Dataset.from_dict(columns, features=features)


def small(image: Image.Image, size: int) -> Image.Image:
    """Square, `size` pixels a side."""
    return image if image.width == size else image.resize((size, size), Image.Resampling.LANCZOS)


def array(images: list[Image.Image]) -> np.ndarray:
    """(N, H, W, 3) uint8, as the audit's functions take images."""
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


# Classes of garments: trousers and dresses, from scratch; sandals and bags, which no base has seen.
SIMPLE, UNSEEN = (1, 3), (5, 8)


def _of_classes(pictures: Pictures, classes: tuple[int, ...]) -> Pictures:
    return pictures.at(np.flatnonzero(np.isin(pictures.labels, classes)))


def seen_classes() -> Pictures:
    """What the base of `garments-new` is trained on: 8,000 garments of the eight other classes."""
    others = tuple(label for label in range(10) if label not in UNSEEN)
    return _of_classes(garments(count=12000), others).at(np.arange(8000))


def _garments(
    seed: int,
    cache: Path,
    classes: tuple[int, ...] = tuple(range(10)),
    once: int = ONCES,
    tail: Mapping[int, int] = LONG_TAIL,
) -> EvidenceSet:
    test = _of_classes(garments("t10k"), classes)
    order = np.random.default_rng(29).permutation(len(test.images))
    quality, seen = test.at(order[:1000]), test.at(order[1000:1256])
    # The second half of the images is left to the network that makes the features.
    return build(_of_classes(garments(count=3000), classes), once, quality, seen, size=16, seed=seed, tail=tail)


def _emoji(seed: int, cache: Path) -> EvidenceSet:
    everything = emoji()
    order = np.random.default_rng([seed, 29]).permutation(len(everything.images))
    # There are too few for 1,000 held-out ones.
    parts = (everything.at(order[:-600]), everything.at(order[-600:-128]), everything.at(order[-128:]))
    return build(parts[0], ONCES, parts[1], parts[2], size=16, seed=seed)


def _fluent(seed: int, cache: Path) -> EvidenceSet:
    everything = fluent_emoji(cache)
    order = np.random.default_rng([seed, 29]).permutation(len(everything.images))
    parts = (everything.at(order[:-900]), everything.at(order[-900:-64]), everything.at(order[-64:]))
    return build(parts[0], ONCES, parts[1], parts[2], size=64, seed=seed)


# By name: makes the set of a seed, given a folder for what is downloaded.
SETS: dict[str, Callable[[int, Path], EvidenceSet]] = {
    "garments": partial(_garments, classes=SIMPLE),
    "garments-class": _garments,
    "emoji": _emoji,
    "garments-new": partial(_garments, classes=UNSEEN),
    "text-to-image": _fluent,
    **{name: partial(_garments, classes=UNSEEN, once=once, tail={}) for name, once in UNIQUES.items()},
    LONG: _fluent,
}
