"""Reads tables: from the Hub, or a local folder of parquet, arrow, json, webdataset or `save_to_disk` files."""

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..config.settings import DataConfig
from ..errors import UserError, one_line
from .faults import Faults
from .files import TEXT_KINDS, find_files, has_captions, is_image, is_visible, kind_of
from .hashes import HASH_BYTES, file_stamp, remembered
from .image_folder import read_image_folder
from .names import check_name
from .quiet import quiet_datasets
from .samples import Columns, Samples, class_column, read_file, text_columns


@dataclass(frozen=True)
class TableReader:
    """Reads encoded images from one column of a `datasets` table; a table on disk is pickled by its paths.

    A row holds bytes, a path, or a `datasets` image with both. Paths are relative to `folder`, if given.
    """

    table: datasets.Dataset
    column: str
    folder: str | None
    source: str

    def __call__(self, index: int) -> bytes:
        value = self._value(index)
        if isinstance(value, bytes):
            return value
        if not value:
            raise UserError(f"row {index} of {self.source} has no image in `--image_column {self.column}`.")
        if "://" in value or not (self.folder or os.path.isabs(value)):
            raise UserError(
                f"row {index} of {self.source} points to `{value}`, which is not a file of this machine: "
                "download or unpack the images first, and give their folder."
            )
        return read_file(os.path.join(self.folder or "", value))

    def stamp(self, index: int) -> str | None:
        """As `Reader.stamp`."""
        if self._table_stamp is not None:
            return f"{self._table_stamp} {index}"
        value = self._value(index)
        return file_stamp(os.path.join(self.folder or "", value)) if isinstance(value, str) else None

    def _value(self, index: int) -> bytes | str | None:
        value = self.table[index][self.column]
        return value.get("bytes") or value.get("path") if isinstance(value, dict) else value

    @cached_property
    def _table_stamp(self) -> str | None:
        """The stamp of the table's files; None if a row holds no bytes. Reads the rows' lengths only."""
        values = self.table.data.column(self.column)
        if pa.types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
            values = pc.struct_field(values, "bytes")
        stamps = [file_stamp(file["filename"]) for file in self.table.cache_files]
        embedded = pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)
        if not embedded or not stamps or None in stamps:
            return None
        shortest = pc.min(pc.fill_null(pc.binary_length(values), 0)).as_py()
        return f"{self.table._fingerprint} {stamps}" if shortest else None


def read_named_dataset(data: DataConfig, columns: Columns, cache_dir: str | None, faults: Faults) -> Samples:
    """Reads the samples of `--dataset_name`: a local folder in any format that `datasets` reads, or a Hub id.

    Args:
        faults: is told of what is wrong with single rows and images.

    Raises:
        UserError: the data set, split, configuration or column is missing or unreadable; captions are not text.
    """
    name = str(data.dataset_name)
    source = f"`--dataset_name {name}`"
    if os.path.isfile(name):
        raise UserError(f"{source} is a file: give the folder that holds it.")
    check_name(f"`--cache_dir {cache_dir}`", cache_dir, patterns=False)
    if not os.path.isdir(name):
        return table_samples(_load(data, name, cache_dir), columns, name, source, None, faults)
    if _is_image_folder(name):
        if data.dataset_split != "train":
            raise _unknown_split(data, source, ["train"])
        return read_image_folder(source, find_files(name), columns, faults)
    is_saved = any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
    check_name(source, name, patterns=not is_saved)
    if is_saved:
        table = _load_saved(data, name, source)
        return table_samples(table, columns, name, source, os.path.abspath(name), faults)
    return _local_folder(data, name, source, columns, cache_dir, faults)


def _is_image_folder(name: str) -> bool:
    """Whether a folder has a table of captions, or images with text files, for which `datasets` has no word."""
    return has_captions([entry.path for entry in os.scandir(name) if entry.is_file() and is_visible(entry.name)])


def _local_folder(
    data: DataConfig, name: str, source: str, columns: Columns, cache_dir: str | None, faults: Faults
) -> Samples:
    splits, is_image_folder = _local_files(data, name, cache_dir)
    if is_image_folder:
        if data.dataset_split not in splits:
            raise _unknown_split(data, source, list(splits))
        _refuse_images_without_split(name, source, splits)
        return read_image_folder(source, _with_texts(splits[data.dataset_split]), columns, faults)
    # `datasets` caches by path and modification time; a folder named by the contents is never stale.
    files = [os.path.join(name, "README.md"), *(path for files in splits.values() for path in files)]
    contents = _hash_files([os.path.abspath(path) for path in files if os.path.isfile(path)], name, cache_dir)
    base = cache_dir or str(datasets.config.HF_DATASETS_CACHE)
    table = _load(data, name, os.path.join(base, f"contents-{contents}"))
    return table_samples(table, columns, name, source, os.path.abspath(name), faults)


def _with_texts(paths: list[str]) -> list[str]:
    """The files of a split and the text files beside them, which `datasets` leaves out."""
    folders, known = dict.fromkeys(os.path.dirname(path) for path in paths), {*paths}
    beside = (os.path.join(folder, name) for folder in folders for name in sorted(os.listdir(folder or ".")))
    return [*paths, *(path for path in beside if kind_of(path) in TEXT_KINDS and path not in known)]


def _local_files(data: DataConfig, name: str, cache_dir: str | None) -> tuple[dict[str, list[str]], bool]:
    try:
        with quiet_datasets():
            builder = datasets.load_dataset_builder(name, data.dataset_config_name, cache_dir=cache_dir)
    except Exception as error:
        raise _not_loaded(data, error) from error
    found = builder.config.data_files or {}
    root = os.path.abspath(name)
    splits = {
        str(split): sorted(p if "://" in p else os.path.join(name, os.path.relpath(p, root)) for p in files)
        for split, files in found.items()
    }
    return splits, isinstance(builder, ImageFolder)


def _refuse_images_without_split(name: str, source: str, splits: dict[str, list[str]]) -> None:
    # From "train-station.png" and "cat.png" `datasets` guesses a split of one image and drops the other.
    if os.path.exists(os.path.join(name, "README.md")):
        return  # which may assign files to splits on purpose
    known = {path for files in splits.values() for path in files}
    strays = [path for path in find_files(name) if is_image(path) and path not in known]
    if strays:
        raise UserError(
            f"{source} has {len(strays)} images outside its splits ({', '.join(splits)}), the first is `{strays[0]}`. "
            "Move them, or give a folder without splits as `--train_data_dir`."
        )


def _hash_files(paths: list[str], name: str, cache_dir: str | None) -> str:
    def hash_one(index: int) -> bytes:
        with open(paths[index], "rb") as file:
            return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=HASH_BYTES)).digest()

    source = f"files of {os.path.abspath(name)}"
    hashes, _ = remembered(map(file_stamp, paths), hash_one, HASH_BYTES, source, cache_dir)
    return hashlib.blake2b(hashes.tobytes().hex().encode(), digest_size=HASH_BYTES).hexdigest()


def _load(data: DataConfig, name: str, cache_dir: str | None) -> datasets.Dataset:
    try:
        with quiet_datasets():
            return datasets.load_dataset(name, data.dataset_config_name, split=data.dataset_split, cache_dir=cache_dir)
    except Exception as error:  # network, format, split, disk: the library raises all kinds of errors
        raise _not_loaded(data, error) from error


def _load_saved(data: DataConfig, name: str, source: str) -> datasets.Dataset:
    try:
        with quiet_datasets():
            saved = datasets.load_from_disk(name)
    except Exception as error:
        raise _not_loaded(data, error) from error
    if isinstance(saved, datasets.DatasetDict):
        if data.dataset_split not in saved:
            raise _unknown_split(data, source, list(saved))
        return saved[data.dataset_split]
    if data.dataset_split != str(saved.split or "train"):
        raise _unknown_split(data, source, [str(saved.split or "train")])
    return saved


def _unknown_split(data: DataConfig, source: str, splits: list[str]) -> UserError:
    return UserError(
        f"`--dataset_split {data.dataset_split}` is no split of {source}, which has: {', '.join(splits)}."
    )


def _not_loaded(data: DataConfig, error: Exception) -> UserError:
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    source, text = f"`--dataset_name {data.dataset_name}`", " ".join(str(error).split()) or type(error).__name__
    if "Unknown split" in text:
        return UserError(f"`--dataset_split {data.dataset_split}` does not fit {source}: {text}")
    if "corresponds to no data" in text or isinstance(error, IndexError):  # the latter from `load_from_disk`
        return UserError(f"`--dataset_split {data.dataset_split}` of {source} has no rows.")
    if "Config name is missing" in text:
        choices = text.partition("configs: ")[2].partition(" Example")[0]
        return UserError(
            f"{source} has several configurations: choose one with `--dataset_config_name`, of {choices}."
        )
    if "BuilderConfig" in text:
        return UserError(f"`--dataset_config_name {data.dataset_config_name}` does not fit {source}: {text}.")
    if not os.path.isdir(str(data.dataset_name)):
        hint = "it is no folder here, and the Hub did not give it"
        return UserError(f"{source} cannot be loaded: {hint} ({one_line(error)}). Check the name and the network.")
    return UserError(f"{source} cannot be read: {one_line(error).rstrip('.')}.")


def table_samples(
    table: datasets.Dataset, columns: Columns, name: str, source: str, folder: str | None, faults: Faults
) -> Samples:
    """The samples of a table.

    Args:
        name: what its rows are called rows of.
        source: what it is called in errors.
        folder: what the paths in it are relative to; None if that is nothing.
        faults: is told of what is wrong with single rows.

    Raises:
        UserError: a column is missing or holds something else; names it.
    """
    features = table.features
    columns = _found_columns(columns, features, source)
    if isinstance(features[columns.image], datasets.Image):
        table = table.cast_column(columns.image, datasets.Image(decode=False))
    if table.info.builder_name == "imagefolder":
        # `datasets` reads several metadata files in the order of a set, which differs between processes.
        table = table.select(sorted(range(len(table)), key=[repr(sorted(row.items())) for row in table].__getitem__))
    values = {column: table.select_columns([column])[:][column] for column in columns.named if column in features}
    names = [f"row {row} of {name}" for row in range(len(table))]
    captions, labels = text_columns(columns, values, features, names, faults)
    reader = TableReader(table.select_columns([columns.image]), columns.image, folder, source)
    return Samples(reader, tuple(names), captions, labels, *class_column(columns, values, features, names, faults))


def _found_columns(columns: Columns, features: datasets.Features, source: str) -> Columns:
    """The columns by their names in this table.

    Raises:
        UserError: one is missing or holds something else.
    """
    columns = replace(columns, caption=columns.captions_in([*features]))
    needed = columns if columns.default_caption is None else replace(columns, caption=None)
    needed.check([*features], source)
    if not _may_hold_images(features[columns.image]):
        raise UserError(f"`--image_column {columns.image}` of {source} holds {features[columns.image]}, not images.")
    texts = datasets.Value | datasets.List | datasets.LargeList
    if columns.caption in features and not isinstance(features[columns.caption], texts):
        raise UserError(f"`--caption_column {columns.caption}` of {source} holds no text: choose another column.")
    return columns


def _may_hold_images(feature: Any) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary")
    return isinstance(feature, datasets.Image) or (
        isinstance(feature, dict) and bool({"bytes", "path"} & set(feature))
    )
