"""`--dedup`: leaves out training images that show what an earlier one shows."""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import PIL
import PIL.Image
import torch
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError

from .columnar import TextLists
from .dataset import TrainingImages
from .duplicates import METHOD, find_duplicates
from .images import DECODING
from .rows import Rows

# Side at most of the images among which near copies are looked for; all are made square.
SIDE = 64
_THREADS = 8
_BLOCK = 256


@dataclass(frozen=True)
class LeftOut:
    """Training images that are not trained on because they are copies of others.

    Attributes:
        images: they themselves.
        stand_in: (len(images),) int64, which of the images that are trained on each is a copy of.
        copies: (n,) int64, for how many images each of those stands, itself among them.
        exact: how many have the pixels of another, as they are or mirrored; the others are near copies.
    """

    images: TrainingImages
    stand_in: np.ndarray
    copies: np.ndarray
    exact: int

    @property
    def words(self) -> str:
        """What was left out, in a line."""
        near = len(self.images) - self.exact
        kinds = [f"{count} {kind}" for count, kind in ((self.exact, "exact"), (near, "near")) if count]
        total = len(self.images) + len(self.copies)
        return f"left out {len(self.images)} of {total} training images, which are copies ({', '.join(kinds)})"


def nothing_left_out(images: TrainingImages) -> LeftOut:
    """What is left out where no copies are looked for."""
    return LeftOut(images.subset([]), np.zeros(0, np.int64), np.ones(len(images), np.int64), 0)


def without_copies(
    images: TrainingImages, which: str, resolution: int, cache_dir: str | None
) -> tuple[TrainingImages, LeftOut]:
    """The first image of each group of copies, with the captions of all of the group; and the others.

    Images of different classes are no copies of each other. What was found is kept in the cache.

    Args:
        which: "exact" (the same pixels, as they are or mirrored) or "near" too; see `find_duplicates`.
        resolution: of training.
        cache_dir: as in `load_images`.

    Raises:
        UserError: an image cannot be read.
    """
    representative, exact = find_copies(images, which, resolution, cache_dir)
    kept = np.flatnonzero(representative == np.arange(len(images)))
    left_out = np.flatnonzero(representative != np.arange(len(images)))
    groups: dict[int, list[int]] = defaultdict(list)
    for number, one in enumerate(representative.tolist()):
        groups[one].append(number)
    captions = TextLists.of(
        tuple(dict.fromkeys(caption for member in groups[one] for caption in images.captions[member]))
        for one in kept.tolist()
    )
    about = LeftOut(
        images.subset(left_out),
        np.searchsorted(kept, representative[left_out]),
        np.array([len(groups[one]) for one in kept.tolist()], np.int64),
        int(exact[left_out].sum()),
    )
    return replace(images.subset(kept), captions=captions), about


def find_copies(
    images: TrainingImages, which: str, resolution: int, cache_dir: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """The first image of the group of copies that each belongs to; arguments and errors as of `without_copies`.

    Returns:
        (N,) int64 indices, and (N,) bool, whether an earlier image has the same pixels, as they are or mirrored.
    """
    side = min(SIDE, resolution)
    made_from: dict[str, object] = {"copies": which, "side": side, "method": METHOD, "Pillow": PIL.__version__}
    made_from |= {"decoding": DECODING, "max_pixels": images.max_pixels}
    return _remembered(images, made_from, cache_dir, lambda: _first_of_each(images, which, side))


def _first_of_each(images: TrainingImages, which: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    digests, small = _read(images, side if which == "near" else None)
    seen: dict[tuple[bytes, int | None], int] = {}
    classes = (None,) * len(images) if images.classes is None else tuple(images.classes)
    first = np.array([seen.setdefault(key, i) for i, key in enumerate(zip(digests, classes, strict=True))], np.int64)
    exact = first != np.arange(len(images))
    if small is None:
        return first, exact
    for class_ in sorted({*classes}, key=str):
        members = np.array([i for i in np.flatnonzero(~exact) if classes[i] == class_], np.int64)
        first[members] = members[find_duplicates(small[members]).representative]
    # Exact copies follow where the image that they are copies of has gone.
    return first[first], exact


def _read(images: TrainingImages, side: int | None) -> tuple[list[bytes], np.ndarray | None]:
    """A digest of the pixels of each image, which it shares with its mirror image; and (N, side, side, 3) uint8."""
    small = None if side is None else np.empty((len(images), side, side, 3), np.uint8)

    def read(index: int) -> bytes:
        image = images.load(index)
        if small is not None:
            # Blown up by boxes, a small image would not lie on its own crop.
            filter_ = PIL.Image.Resampling.BOX if min(image.size) >= small.shape[1] else PIL.Image.Resampling.BICUBIC
            small[index] = np.asarray(image.resize(small.shape[1:3], filter_))
        pixels = np.asarray(image)
        both = (pixels, np.ascontiguousarray(pixels[:, ::-1]))
        size = repr(pixels.shape).encode()
        return min(hashlib.blake2b(each.tobytes() + size, digest_size=16).digest() for each in both)

    digests: list[bytes] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(images), _BLOCK):
            digests += pool.map(read, range(start, min(start + _BLOCK, len(images))))
    return digests, small


def _remembered(
    images: TrainingImages,
    made_from: dict[str, object],
    cache_dir: str | None,
    compute: Callable[[], tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """What `compute` returns, kept in the cache by the images' contents and classes."""
    key = hashlib.blake2b(repr((images.content_hashes, images.classes)).encode()).hexdigest()
    rows = None
    with suppress(OSError, ValueError):
        rows = Rows(cached_assets_path("iet_finetune", "data", "copies", assets_dir=cache_dir), made_from)
    if rows is not None and not rows.missing([key]):
        found = rows.read(rows.places([key])[0])
        return found["first"].numpy(), found["exact"].numpy()
    first, exact = compute()
    if rows is not None:
        with suppress(OSError, SafetensorError):
            rows.add([key], {"first": torch.from_numpy(first)[None], "exact": torch.from_numpy(exact)[None]})
    return first, exact
