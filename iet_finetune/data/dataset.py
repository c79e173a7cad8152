"""The images of a run: captions, content hashes and pixels, and the split into training and held-out images."""

import hashlib
import os
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii

import datasets
import numpy as np
import PIL.Image

from ..config.settings import DataConfig
from ..errors import UserError
from .columnar import Digests, Indices, Numbers, TextLists, Texts
from .draws import draw_held_out, draw_subset
from .hashes import HASH_BYTES, content_hash, remembered, settle
from .image_folder import find_files, read_image_folder
from .images import check_image, decode_rgb
from .samples import Columns, Samples, numbered
from .stored import Stored, stored
from .table import TableReader, read_named_dataset, table_samples

# So many images are not hashed a second time only because their table was written a moment before the first.
_WORTH_WAITING = 10_000


@dataclass(frozen=True)
class TrainingImages:
    """Images in a fixed order, each with one or several captions; picklable, and pixels are read on demand.

    Captions, hashes and names are sequences of tuples and texts, but are kept in arrays: a million images take no
    million Python objects. What belongs to a subset shares the memory of the whole; a pickle holds the subset alone.

    Attributes:
        captions: the captions of each image.
        content_hashes: hexadecimal blake2b digests (16 bytes) of the encoded images, independent of names and dates.
        names: the images' names in errors.
        shard_labels: the texts of `--shard_by_column`; None without the flag.
        classes: class numbers of `--class_column`; None without the flag.
        class_names: their names by number; None without the flag.
    """

    captions: TextLists
    content_hashes: Digests
    names: Texts
    shard_labels: Texts | None
    _stored: Stored
    classes: Numbers | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.content_hashes)

    def load(self, index: int) -> PIL.Image.Image:
        """Loads an image in mode RGB, upright and on white (see `images.decode_rgb`).

        Raises:
            UserError: it cannot be read, or its content has changed since it was hashed; names it.
        """
        data, name = self._stored.read(index), self.names[index]
        if content_hash(data) != self.content_hashes[index]:
            raise UserError(f"`{name}` changed since the data was loaded. Leave the images alone during a run.")
        return decode_rgb(data, name)

    def subset(self, indices: Indices) -> "TrainingImages":
        """Returns the images at `indices`, none of them negative, in that order."""
        labels, classes = self.shard_labels, self.classes
        return TrainingImages(
            captions=self.captions.take(indices),
            content_hashes=self.content_hashes.take(indices),
            names=self.names.take(indices),
            shard_labels=None if labels is None else labels.take(indices),
            _stored=self._stored.take(indices),
            classes=None if classes is None else classes.take(indices),
            class_names=self.class_names,
        )

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of contents, captions, labels and classes in order; changes when any of them does."""
        digest = hashlib.blake2b(digest_size=HASH_BYTES)
        quoted = encode_basestring_ascii
        labels = ["null"] * len(self) if self.shard_labels is None else map(quoted, self.shard_labels)
        classes = [""] * len(self) if self.classes is None else (f", {number}" for number in self.classes)
        for content, texts, label, class_ in zip(self.content_hashes, self.captions, labels, classes, strict=True):
            # A line of JSON: [content, captions, label, class].
            digest.update(f'["{content}", [{", ".join(map(quoted, texts))}], {label}{class_}]\n'.encode())
        return digest.hexdigest()

    @property
    def num_duplicates(self) -> int:
        """Number of images with the same content as an earlier one."""
        return len(self) - len(np.unique(self.content_hashes.keys))


def load_images(
    data: DataConfig,
    *,
    cache_dir: str | None,
    seed: int,
    shard_by_column: str | None = None,
    needs_captions: bool = True,
    table: datasets.Dataset | None = None,
    table_name: str = "train_images",
) -> tuple[TrainingImages, TrainingImages]:
    """Loads the training and the held-out images from `--train_data_dir` or `--dataset_name`.

    An image is read, to hash it and to check its header, unless it has not changed since an earlier start. The
    held-out images are drawn first and by content, so that duplicates are on one side; then `max_train_samples` of the
    rest are drawn, if there are more. Both draws depend on the seed and the images' contents alone, and keep the order
    of the data.

    Args:
        data: the source and the selection.
        cache_dir: where `datasets` keeps what it downloads and converts, and where content hashes are kept; the
            libraries' default folders if None.
        seed: seed of both draws.
        shard_by_column: column whose values become `shard_labels`.
        needs_captions: if False the caption column is not read, and every caption is empty.
        table, table_name: images in memory, instead of the source that `data` names, and what errors call them.

    Raises:
        UserError: something is missing or wrong; names the flag, column, file or row.
    """
    caption_column = data.caption_column if needs_captions else None
    columns = Columns(data.image_column, caption_column, shard_by_column, data.class_column)
    samples = _read_source(data, cache_dir, columns) if table is None else _of_table(table_name, table, columns)
    images = _hashed(samples, columns, table_name if table is not None else _source(data), cache_dir)
    held_out = draw_held_out(images.content_hashes, data.holdout_fraction, seed)
    training = images.subset(np.flatnonzero(~held_out))
    if data.max_train_samples is not None:
        training = training.subset(draw_subset(training.content_hashes, data.max_train_samples, seed))
    return training, images.subset(np.flatnonzero(held_out))


def load_folder(
    flag: str, folder: str, data: DataConfig, *, captions: bool, cache_dir: str | None = None
) -> TrainingImages:
    """Loads all images of a folder that is not the training data.

    Args:
        flag: the flag that names the folder, for errors.
        data: the columns.
        captions: whether to read captions; if not, every caption is empty.
        cache_dir: where content hashes are kept; Hugging Face's assets cache if None.

    Raises:
        UserError: as `load_images`.
    """
    source = f"`--{flag} {folder}`"
    if not os.path.isdir(folder):
        raise UserError(f"{source} is not a folder. Give the folder that holds the images.")
    caption_column = data.caption_column if captions else None
    columns = Columns(data.image_column, caption_column, None, data.class_column)
    return _hashed(read_image_folder(source, find_files(folder), columns), columns, os.path.abspath(folder), cache_dir)


def load_table(name: str, table: datasets.Dataset, data: DataConfig, *, captions: bool) -> TrainingImages:
    """All images of a table in memory, which errors call `name`; otherwise as `load_folder`."""
    columns = Columns(data.image_column, data.caption_column if captions else None, None, data.class_column)
    return _hashed(_of_table(name, table, columns), columns, name, None)


def _of_table(name: str, table: datasets.Dataset, columns: Columns) -> Samples:
    if not isinstance(table, datasets.Dataset):
        kind = type(table).__name__
        raise UserError(f"`{name}` must be a `datasets.Dataset`, such as one split of a DatasetDict, not a {kind}.")
    # A format or transform would make something else of the encoded images.
    return table_samples(table.with_format(None), columns, name, f"`{name}`", folder=None)


def _read_source(data: DataConfig, cache_dir: str | None, columns: Columns) -> Samples:
    if data.train_data_dir is None:
        if data.dataset_name is None:
            raise UserError("no images: give `--train_data_dir FOLDER` or `--dataset_name NAME`.")
        return read_named_dataset(data, columns, cache_dir)
    source = f"`--train_data_dir {data.train_data_dir}`"
    if not os.path.isdir(data.train_data_dir):
        raise UserError(f"{source} is not a folder. Give the folder that holds the images.")
    if data.dataset_split != "train":
        raise UserError(
            f"`--dataset_split {data.dataset_split}` goes with `--dataset_name`: all of {source} is the split train."
        )
    return read_image_folder(source, find_files(data.train_data_dir), columns)


def _source(data: DataConfig) -> str:
    if data.train_data_dir is not None:
        return os.path.abspath(data.train_data_dir)
    return f"{data.dataset_name} {data.dataset_config_name} {data.dataset_split}"


def _hashed(samples: Samples, columns: Columns, source: str, cache_dir: str | None) -> TrainingImages:
    count = len(samples.names)
    if count == 0:
        raise UserError("the data set has no rows: give one with images.")
    PIL.Image.init()  # loads the decoders once, before several threads need them

    def hash_one(index: int) -> str:
        data = samples.read(index)
        check_image(data, samples.names[index])
        return content_hash(data)

    if isinstance(samples.read, TableReader) and count >= _WORTH_WAITING:
        settle(file["filename"] for file in samples.read.table.cache_files)
    hashes = remembered((samples.read.stamp(index) for index in range(count)), hash_one, source, cache_dir)
    classes, class_names = None, None
    if samples.classes is not None:
        classes, class_names = numbered(samples.classes, samples.class_names, str(columns.class_))
    return TrainingImages(
        TextLists.of(samples.captions),
        hashes,
        Texts.of(samples.names),
        None if samples.labels is None else Texts.of(samples.labels),
        stored(samples.read, count),
        None if classes is None else Numbers.of(classes),
        class_names,
    )
