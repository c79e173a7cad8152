"""Encodes the images and captions of a run once and keeps them on disk, for this run and others."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import PIL.Image
import torch
from huggingface_hub import cached_assets_path
from torch import Tensor

from ..config.config import Config
from ..config.sizes import Size
from ..data.buckets import Buckets, in_words, numbers_of
from ..data.dataset import TrainingImages
from ..data.encoded import MEAN, PLACE, STD, EncodedData
from ..data.rows import Places, Row, Rows, digests
from ..data.transforms import ImageTransform
from ..distributed.groups import Ranks
from ..errors import UserError, one_line
from ..families.base import Family
from ..families.encoding import Encoder
from .filling import complete
from .keys import caption_facts, image_facts

T = TypeVar("T")
R = TypeVar("R")
# Number of threads that read and decode images, and how many images they may be ahead of the encoder.
_THREADS, _AHEAD = 4, 32


def encode_data(
    config: Config,
    family: Family,
    images: TrainingImages,
    transform: ImageTransform,
    ranks: Ranks,
    device: torch.device,
) -> EncodedData:
    """Returns the rows of all images and captions and, with `--random_flip`, of mirrored copies.

    Every rank calls it and encodes a share of the missing rows. The family's encoders are on the device only
    meanwhile, first those of images, then those of captions.

    Raises:
        UserError: an image cannot be read, or the cache folder cannot be written or is full.
    """
    folder, encoder = cache_folder(config.model.cache_dir), Encoder(family, config.training.train_batch_size, device)
    sizes, numbers = _by_size(images, transform.buckets)
    places, rows = np.full((len(images), 2, 2), -1, dtype=np.int32), []
    for number, size in enumerate(sizes):
        own = np.flatnonzero(numbers == number) if len(sizes) > 1 else np.arange(len(images))
        part, mirrored = images.subset(own) if len(sizes) > 1 else images, config.data.random_flip
        image_rows = ImageRows(folder, family, encoder, device, part, transform.at(size), mirrored=mirrored)
        complete(image_rows, ranks)
        places[own] = image_rows.places
        rows.append(image_rows.rows)
    of_images = tuple(rows), numbers if len(sizes) > 1 else None, places
    if not family.needs_captions:
        return EncodedData(*of_images, None, Places.nothing())
    texts = {text for captions in images.captions for text in captions}
    if config.data.caption_dropout:
        texts.add("")
    caption_rows = CaptionRows(folder, family, encoder, device, sorted(texts))
    complete(caption_rows, ranks)
    return EncodedData(*of_images, caption_rows.rows, caption_rows.places)


def _by_size(images: TrainingImages, buckets: Buckets) -> tuple[list[Size], np.ndarray]:
    """The sizes that images have, and which of them is that of each image, (N,) int64."""
    used, numbers = np.unique(numbers_of(images, buckets), return_inverse=True)
    return [buckets.sizes[number] for number in used.tolist()], numbers


def cache_folder(cache_dir: str | None) -> Path:
    """Returns the folder of encoded rows: in `--cache_dir`, or in Hugging Face's assets cache.

    Raises:
        UserError: it cannot be created.
    """
    try:
        return cached_assets_path("iet_finetune", "encoded", "rows", assets_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no folder for encoded images and captions can be created: {one_line(error).rstrip('.')}. Choose another "
            "with `--cache_dir`, or encode in every step with `--no_cache_latents`."
        ) from None


class _Sample(NamedTuple):
    key: str
    pixel_values: Tensor
    place: Tensor


class ImageRows:
    """The images of a run as a source of rows: their posteriors and crops.

    An image that the crop does not cut has the same row for every crop.

    Args:
        folder: the cache folder.
        transform: of one size.
        encoder: the family's.
        mirrored: whether mirrored copies have rows too.
    """

    words = "images"

    def __init__(
        self,
        folder: Path,
        family: Family,
        encoder: Encoder,
        device: torch.device,
        images: TrainingImages,
        transform: ImageTransform,
        *,
        mirrored: bool,
    ) -> None:
        ((width, height),) = transform.buckets.sizes
        if width != height:
            self.words = f"images of {in_words((width, height))}"
        facts = image_facts(family, encoder, transform, device)
        self.rows = Rows(folder, {**facts, "max_pixels": images.max_pixels})
        self._family = family
        self._encoder = encoder
        self._device = device
        self._images = images
        self._transform = transform
        self._flips = (False, True) if mirrored else (False,)
        contents = images.content_hashes
        # Asked for several times; by whether the image is mirrored, and whether it is cut.
        self._keys = {
            (flip, cut): digests(self._key(content, flip, cut) for content in contents)
            for flip in self._flips
            for cut in (False, True)
        }
        self._firsts = np.sort(np.unique(contents.keys, return_index=True)[1])

    @property
    def places(self) -> np.ndarray:
        """(n, 2, 2) int32, as `EncodedData.image_places`; -1 for missing rows."""
        places = np.full((len(self._images), 2, 2), -1, dtype=np.int32)
        for flip in self._flips:
            whole, cut = (self.rows.places(self._keys[flip, cut]) for cut in (False, True))
            places[:, int(flip)] = np.where(whole >= 0, whole, cut)
        return places

    def missing(self) -> list[tuple[int, bool]]:
        """Returns (index, mirrored) of images without a row, each content once."""
        places = self.places
        return [
            (index, flip) for index in self._firsts.tolist() for flip in self._flips if places[index, int(flip), 0] < 0
        ]

    def encode(self, todo: list[tuple[int, bool]]) -> Iterator[tuple[list[str], Row]]:
        """As `Source.encode`; raises a `UserError` if an image cannot be read."""
        if not todo:
            return
        PIL.Image.init()  # loads the decoders once, before several threads need them
        by_image = [list(same) for _, same in groupby(todo, key=itemgetter(0))]
        waiting: list[_Sample] = []
        lent = self._family.lent(self._family.image_encoders, self._device)
        with ThreadPoolExecutor(_THREADS) as pool, lent, torch.no_grad():
            for samples in _ahead(pool, self._load, by_image):
                waiting += samples
                while len(waiting) >= self._encoder.chunk:
                    yield self._encoded(waiting[: self._encoder.chunk])
                    del waiting[: self._encoder.chunk]
            if waiting:
                yield self._encoded(waiting)

    def _key(self, content: str, flip: bool, cut: bool) -> str:
        return f"{content} {self._transform.crop if cut else 'whole'}{' mirrored' if flip else ''}"

    def _load(self, same: list[tuple[int, bool]]) -> list[_Sample]:
        index = same[0][0]
        image, content = self._images.load(index), self._images.content_hashes[index]
        cut = self._transform.is_cut(image.size)
        return [
            _Sample(
                self._key(content, flip, cut),
                self._transform(image, content, flip),
                torch.tensor(self._transform.place(image.size, content, flip)),
            )
            for _, flip in same
        ]

    def _encoded(self, samples: list[_Sample]) -> tuple[list[str], Row]:
        pixel_values = torch.stack([sample.pixel_values for sample in samples]).to(self._device)
        mean, std = self._encoder.images(pixel_values)
        row = {MEAN: mean.cpu().contiguous(), PLACE: torch.stack([sample.place for sample in samples])}
        if self._family.has_posterior:
            row[STD] = std.cpu().contiguous()
        return [sample.key for sample in samples], row


class CaptionRows:
    """Captions as a source of rows: the denoiser's conditions.

    Args:
        folder: the cache folder.
        encoder: the family's.
        texts: the captions, each once.
    """

    words = "captions"

    def __init__(
        self, folder: Path, family: Family, encoder: Encoder, device: torch.device, texts: Sequence[str]
    ) -> None:
        self.rows = Rows(folder, caption_facts(family, encoder, device))
        self._family = family
        self._encoder = encoder
        self._device = device
        self._texts = texts

    @property
    def places(self) -> Places:
        """As `EncodedData.caption_places`."""
        keys = digests(self._texts)
        return Places(keys, self.rows.places(keys))

    def missing(self) -> list[str]:
        """Returns the captions without a row."""
        return [self._texts[number] for number in self.rows.missing(self._texts)]

    def encode(self, todo: list[str]) -> Iterator[tuple[list[str], Row]]:
        """As `Source.encode`."""
        chunk = self._encoder.chunk
        with self._family.lent(self._family.caption_encoders if todo else (), self._device), torch.no_grad():
            for part in (todo[start : start + chunk] for start in range(0, len(todo), chunk)):
                yield part, {name: tensor.cpu().contiguous() for name, tensor in self._encoder.captions(part).items()}


def _ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Yields function(item) for each item, in order, computed by the pool at most `_AHEAD` items ahead."""
    running: deque[Future[R]] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) > _AHEAD:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
