"""The images of a run: captions, content hashes and pixels, and the split into training and held-out images."""

import hashlib
import os
import struct
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii

import datasets
import numpy as np
import PIL.Image

from ..config.settings import DataConfig
from ..errors import UserError
from .columnar import Digests, Indices, Numbers, TextLists, Texts
from .draws import draw_held_out, draw_subset
from .faults import MISSING, UNREADABLE, Faults, without_advice
from .files import find_files, load_plug_ins, why_unreadable
from .hashes import HASH_BYTES, content_hash, digest_of, remembered, settle
from .image_folder import read_image_folder
from .images import decode_rgb, look_at
from .opening import MAX_PIXELS
from .samples import Columns, Samples, numbered
from .stored import Stored, stored
from .table import TableReader, read_named_dataset, table_samples

# What is kept of an image: its content hash, and `images.Looked`. The same as a row of NumPy.
_LOOK = struct.Struct(f"<{HASH_BYTES}sii?")
_LOOKED = np.dtype([("hash", f"S{HASH_BYTES}"), ("width", "<i4"), ("height", "<i4"), ("narrow", "?")])
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
        sizes: (N, 2) int32, width and height in pixels, upright.
        narrow: (N,) bool, whether an image's pixels fill a small part of their range; see `images.look_at`.
        notes: lines on what was made of the source.
        unreadable: names of images of the source that are left out because they cannot be read, and why.
        max_pixels: `--max_image_pixels`.
    """

    captions: TextLists
    content_hashes: Digests
    names: Texts
    shard_labels: Texts | None
    _stored: Stored
    classes: Numbers | None = None
    class_names: tuple[str, ...] | None = None
    sizes: np.ndarray | None = field(default=None, compare=False)
    narrow: np.ndarray | None = field(default=None, compare=False)
    notes: tuple[str, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    max_pixels: int = MAX_PIXELS

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
        return decode_rgb(data, name, self.max_pixels)

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
            sizes=None if self.sizes is None else self.sizes[np.asarray(indices, np.int64)],
            narrow=None if self.narrow is None else self.narrow[np.asarray(indices, np.int64)],
            notes=self.notes,
            unreadable=self.unreadable,
            max_pixels=self.max_pixels,
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
    columns = _columns(data, needs_captions, shard_by_column)
    faults = Faults(_named(data), data.train_data_dir) if table is None else Faults(f"`{table_name}`")
    if table is None:
        samples, source = _read_source(data, cache_dir, columns, faults), _source(data)
    else:
        samples, source = _of_table(table_name, table, columns, faults), table_name
    images = _hashed(samples, columns, source, cache_dir, faults, data)
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
    columns, faults = _columns(data, captions), Faults(source, folder)
    samples = read_image_folder(source, find_files(folder), columns, faults)
    return _hashed(samples, columns, os.path.abspath(folder), cache_dir, faults, data)


def load_table(name: str, table: datasets.Dataset, data: DataConfig, *, captions: bool) -> TrainingImages:
    """All images of a table in memory, which errors call `name`; otherwise as `load_folder`."""
    columns, faults = _columns(data, captions), Faults(f"`{name}`")
    return _hashed(_of_table(name, table, columns, faults), columns, name, None, faults, data)


def _columns(data: DataConfig, captions: bool, label: str | None = None) -> Columns:
    """What is to be read of the images; without `captions` every caption is empty."""
    return Columns(
        data.image_column,
        data.caption_column if captions else None,
        label,
        data.class_column,
        data.usual_caption,
        data.caption_from == "folder",
    )


def _of_table(name: str, table: datasets.Dataset, columns: Columns, faults: Faults) -> Samples:
    if not isinstance(table, datasets.Dataset):
        kind = type(table).__name__
        raise UserError(f"`{name}` must be a `datasets.Dataset`, such as one split of a DatasetDict, not a {kind}.")
    # A format or transform would make something else of the encoded images.
    return table_samples(table.with_format(None), columns, name, f"`{name}`", None, faults)


def _read_source(data: DataConfig, cache_dir: str | None, columns: Columns, faults: Faults) -> Samples:
    if data.train_data_dir is None:
        if data.dataset_name is None:
            raise UserError("no images: give `--train_data_dir FOLDER` or `--dataset_name NAME`.")
        return read_named_dataset(data, columns, cache_dir, faults)
    source = faults.source
    if not os.path.isdir(data.train_data_dir):
        raise UserError(f"{source} is not a folder. Give the folder that holds the images.")
    if data.dataset_split != "train":
        raise UserError(
            f"`--dataset_split {data.dataset_split}` goes with `--dataset_name`: all of {source} is the split train."
        )
    return read_image_folder(source, find_files(data.train_data_dir), columns, faults)


def _named(data: DataConfig) -> str:
    if data.train_data_dir is not None:
        return f"`--train_data_dir {data.train_data_dir}`"
    return f"`--dataset_name {data.dataset_name}`"


def _source(data: DataConfig) -> str:
    if data.train_data_dir is not None:
        return os.path.abspath(data.train_data_dir)
    return f"{data.dataset_name} {data.dataset_config_name} {data.dataset_split}"


def _hashed(
    samples: Samples, columns: Columns, source: str, cache_dir: str | None, faults: Faults, data: DataConfig
) -> TrainingImages:
    """Looks at every image, unless it has not changed since an earlier start.

    Raises:
        UserError: all that is wrong with the data.
    """
    count = len(samples.names)
    if count == 0:
        faults.raise_if_any()
        raise UserError("the data set has no rows: give one with images.")
    load_plug_ins()  # once, before several threads need the decoders
    errors: dict[int, str] = {}

    def look(index: int) -> bytes | None:
        try:
            encoded = samples.read(index)
            return _LOOK.pack(digest_of(encoded), *look_at(encoded, samples.names[index], data.max_image_pixels))
        except UserError as error:
            errors[index] = why_unreadable(samples.names[index]) or str(error)
            return None

    if isinstance(samples.read, TableReader) and count >= _WORTH_WAITING:
        settle(file["filename"] for file in samples.read.table.cache_files)
    stamps, source = map(samples.read.stamp, range(count)), f"{source} {data.max_image_pixels}"
    looks, readable = remembered(stamps, look, _LOOK.size, source, cache_dir)
    skipped = _without_unreadable(samples, errors, faults, data)
    if not readable.any():
        raise UserError(
            f"{faults.source}: none of the {count} images can be read; the first, `{skipped[0][0]}`, {skipped[0][1]}."
        )
    seen = looks.view(_LOOKED)[:, 0]
    classes, class_names = None, None
    if samples.classes is not None:
        classes, class_names = numbered(samples.classes, samples.class_names, str(columns.class_))
    images = TrainingImages(
        TextLists.of(samples.captions),
        Digests(np.ascontiguousarray(looks[:, :HASH_BYTES])),
        Texts.of(samples.names),
        None if samples.labels is None else Texts.of(samples.labels),
        stored(samples.read, count),
        None if classes is None else Numbers.of(classes),
        class_names,
        np.stack([seen["width"], seen["height"]], axis=1),
        seen["narrow"].copy(),
        samples.notes,
        skipped,
        data.max_image_pixels,
    )
    return images if readable.all() else images.subset(np.flatnonzero(readable))


def _without_unreadable(
    samples: Samples, errors: dict[int, str], faults: Faults, data: DataConfig
) -> tuple[tuple[str, str], ...]:
    """Names of what is left out because it cannot be read, and why.

    Raises:
        UserError: all that is wrong with the data, if anything is that may not be left out.
    """
    unreadable = {samples.names[index]: errors[index] for index in sorted(errors)}
    skipped = []
    if data.skip_bad_images:
        skipped += [(name, without_advice(why).removeprefix(f"`{name}` ")) for name, why in unreadable.items()]
        skipped += [(name, "is not there") for name in faults.take(MISSING)]
    else:
        for name, why in unreadable.items():
            faults.add(UNREADABLE, why if name in why else f"`{name}`: {why}")
    faults.raise_if_any()
    return tuple(skipped)
