"""What a set of images is like, before anything is trained on it: in lines, and as a page with pictures."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..config.settings import DataConfig
from ..config.sizes import named_sizes
from ..errors import UserError
from ..pages.page import embedded, render, write_page
from .about import (
    buckets_in_words,
    count_in_words,
    cut_in_words,
    doubts_of_captions,
    doubts_of_pixels,
    shares_cut,
    sizes_in_words,
)
from .buckets import chosen_buckets, in_words, numbers_of, shares_outside
from .dataset import TrainingImages, load_images
from .dedup import find_copies
from .files import find_files, has_captions
from .transforms import ImageTransform

TEMPLATE = Path(__file__).with_name("survey.html.jinja")
# How many are shown at most: groups of copies, images of a group, crops, captions.
MOST_GROUPS, MOST_OF_GROUP, MOST_CROPS, MOST_CAPTIONS = 40, 6, 12, 10

# Of how many pixels sides are multiples where no model says it; a small one may take smaller steps.
USUAL_MULTIPLE = 8

Part = dict[str, Any]


@dataclass(frozen=True)
class Survey:
    """A set of images, and the copies in it.

    Attributes:
        images: all that can be read.
        has_captions: whether there are any.
        groups: indices of images that show the same thing, the first one first; the largest groups first.
        exact: (N,) bool, whether an earlier image has the same pixels, as they are or mirrored.
        transform: what brings them to the sizes of training.
        folder: that the images' names are shown without; None if they are in none.
    """

    images: TrainingImages
    has_captions: bool
    groups: list[list[int]]
    exact: np.ndarray
    transform: ImageTransform
    folder: str | None = None

    def name(self, index: int) -> str:
        """What an image is called on the page."""
        return self.images.names[index].removeprefix(os.path.join(self.folder or "", ""))

    @property
    def copies(self) -> int:
        """How many images show what an earlier one shows."""
        return sum(len(group) - 1 for group in self.groups)


def survey(data: DataConfig, *, seed: int, cache_dir: str | None) -> Survey:
    """Looks at all images that the settings name, and for exact and near copies among them.

    Raises:
        UserError: all that is wrong with the data.
    """
    images, captions = _load(data, seed, cache_dir)
    buckets = chosen_buckets(data, USUAL_MULTIPLE if named_sizes(data.aspect_ratio_buckets) is None else 1)
    numbers_of(images, buckets)  # raises an error where an image is too small
    representative, exact = find_copies(images, "near", data.resolution, cache_dir)
    members: dict[int, list[int]] = defaultdict(list)
    for index, one in enumerate(representative.tolist()):
        members[one].append(index)
    groups = sorted((group for group in members.values() if len(group) > 1), key=lambda group: -len(group))
    transform = ImageTransform(
        buckets, center_crop=data.center_crop, interpolation=data.image_interpolation_mode, seed=seed
    )
    return Survey(images, captions, groups, exact, transform, data.train_data_dir)


def _load(data: DataConfig, seed: int, cache_dir: str | None) -> tuple[TrainingImages, bool]:
    """The images, and whether they have captions; those of a folder need none."""
    captions = True
    if data.train_data_dir is not None and data.usual_caption is None and data.caption_from != "folder":
        # A folder that is not there is told by `load_images`.
        captions = has_captions(find_files(data.train_data_dir))
    everything = replace(data, holdout_fraction=0.0, max_train_samples=None)
    images, _ = load_images(everything, cache_dir=cache_dir, seed=seed, needs_captions=captions)
    return images, captions


def lines(found: Survey) -> Iterator[str]:
    """What there is, for the terminal."""
    images = found.images
    distinct = len(images) - found.copies
    yield f"images: {count_in_words(len(images), distinct, 'distinct')}, {sizes_in_words(images)}"
    yield from images.notes
    if images.unreadable:
        yield f"cannot be read: {len(images.unreadable)}, such as `{images.unreadable[0][0]}`"
    if found.copies:
        exact = int(found.exact.sum())
        yield (
            f"copies: {exact} exact, {found.copies - exact} near, in {len(found.groups)} groups; "
            "`--dedup near` trains on one of each"
        )
    yield f"captions: {_captions_in_words(found)}"
    if (sizes := buckets_in_words(images, found.transform.buckets)) is not None:
        yield f"sizes: {sizes}"
    if (cut := cut_in_words(images, found.transform.buckets)) is not None:
        yield f"crops: {cut}"
    yield from (f"look at: {doubt}" for doubt in _doubts(found))


def _captions_in_words(found: Survey) -> str:
    if not found.has_captions:
        return "none; `--default_caption TEXT` gives all images one, models without prompts need none"
    texts = {text for captions in found.images.captions for text in captions}
    return f"{len(texts)} distinct"


def _doubts(found: Survey) -> Iterator[str]:
    yield from doubts_of_pixels(found.images, found.transform.buckets)
    if found.has_captions:
        yield from doubts_of_captions(found.images)


def write_survey(path: Path, name: str, found: Survey) -> Path:
    """Writes the page; `name` is its title.

    Raises:
        UserError: the file cannot be written, or an image has changed since it was looked at.
    """
    page = render(
        TEMPLATE,
        name=name,
        lines=[line[:1].upper() + line[1:] for line in lines(found)],
        groups=[_group(found, group) for group in found.groups[:MOST_GROUPS]],
        more=max(len(found.groups) - MOST_GROUPS, 0),
        crops=[_crop(found, index) for index in _most_cut(found)],
        squares=found.transform.buckets.sizes[0][0] if len(found.transform.buckets.sizes) == 1 else None,
        captions=_frequent(found.images) if found.has_captions else [],
        unreadable=found.images.unreadable,
    )
    try:
        return write_page(path, page)
    except OSError as error:
        raise UserError(f"`{path}` cannot be written: {error.strerror}. Choose another place.") from None


def _group(found: Survey, group: list[int]) -> Part:
    shown = group[:MOST_OF_GROUP]
    return {
        "size": len(group),
        "more": len(group) - len(shown),
        "images": [
            {
                "image": embedded(found.images.load(index)),
                "name": found.name(index),
                "kind": "first" if index == group[0] else "exact or mirrored" if found.exact[index] else "near copy",
            }
            for index in shown
        ],
    }


def _most_cut(found: Survey) -> list[int]:
    """The images of which most is cut off, or the first ones if nothing is."""
    shares = shares_cut(found.images, found.transform.buckets)
    order = range(len(found.images)) if shares is None else np.argsort(-shares, kind="stable").tolist()
    return list(order)[:MOST_CROPS]


def _crop(found: Survey, index: int) -> Part:
    """An image as it is, and as it will be trained on."""
    image, content = found.images.load(index), found.images.content_hashes[index]
    pixels = found.transform(image, content, flip=False).add(1).mul(127.5).round().clamp(0, 255)
    trained = Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())
    cut = float(shares_outside(np.array([image.size]), np.array([trained.size]))[0])
    return {
        "name": found.name(index),
        "size": f"{image.width} x {image.height}",
        "cut": f"{cut:.0%}",
        "trained": in_words(trained.size),
        "whole": embedded(image),
        "crop": embedded(trained),
    }


def _frequent(images: TrainingImages) -> list[tuple[str, int]]:
    """The most frequent captions and how many images have each."""
    counts = Counter(text for captions in images.captions for text in captions)
    return counts.most_common(MOST_CAPTIONS)
