"""Reads folders of images with metadata.jsonl, .csv or .parquet, without losing an image silently."""

import glob
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..errors import UserError, one_line
from .names import without_colons
from .quiet import quiet_datasets
from .samples import Columns, FileReader, Samples, class_column, text_columns

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_EXAMPLE = '{"file_name": "cat.png", "text": "a cat on a sofa"}'


def is_metadata(path: str) -> bool:
    """Whether a file holds captions, judging by its name."""
    return os.path.basename(path) in METADATA_NAMES


def is_image(path: str) -> bool:
    """Whether `datasets` recognizes a file as an image by its extension."""
    return os.path.splitext(path)[1].lower() in ImageFolder.EXTENSIONS


def find_files(folder: str) -> list[str]:
    """Returns every file below a folder in a fixed order, except hidden ones, which `datasets` skips too."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        found += [os.path.join(parent, name) for name in sorted(files) if not name.startswith((".", "__"))]
    return found


def read_image_folder(source: str, files: list[str], columns: Columns) -> Samples:
    """Returns one sample per row of the metadata files, or per image if there are none and captions are not needed.

    Each metadata file is loaded on its own, because `datasets` would drop images without a row, guess splits from file
    names ("train-station.png" would be the only training image) and read several metadata files in arbitrary order.

    Args:
        source: the folder's name in errors, such as "`--train_data_dir data/cats`".
        files: the folder's files; metadata files name images relative to their own folder.
        columns: which columns to read.

    Raises:
        UserError: no images, no metadata, an unknown column, an image without a row, or a caption that is not text.
    """
    images, metadata = [path for path in files if is_image(path)], [path for path in files if is_metadata(path)]
    if not images:
        raise UserError(f"{source} has no images. Give a folder with image files (archives must be unpacked).")
    if not metadata and columns.caption is None:
        return _without_metadata(source, images, columns)
    if not metadata:
        raise UserError(f"{source} has no captions: add a metadata.jsonl with lines such as {_EXAMPLE}.")
    _refuse_two_in_one_folder(source, metadata)
    paths: list[str] = []
    captions: list[tuple[str, ...]] = []
    labels: list[str] = []
    classes: list[int | str] = []
    for path in metadata:
        part = _read_metadata(path, columns)
        paths += part.names
        captions += part.captions
        labels += part.labels or ()
        classes += part.classes or ()
    _refuse_images_without_row(source, images, paths)
    return _samples(columns, paths, captions, labels, classes)


def _samples(
    columns: Columns,
    paths: list[str],
    captions: list[tuple[str, ...]],
    labels: Sequence[str],
    classes: Sequence[int | str],
) -> Samples:
    # Absolute paths survive a change of the working directory; names stay as the user wrote them.
    reader = FileReader(tuple(os.path.abspath(path) for path in paths))
    return Samples(
        reader,
        tuple(paths),
        tuple(captions),
        None if columns.label is None else tuple(labels),
        None if columns.class_ is None else tuple(classes),
    )


def _without_metadata(source: str, images: list[str], columns: Columns) -> Samples:
    columns.check(
        ["image", "label"], f"{source} (without metadata)"
    )  # as in `datasets`, the label is the folder's name
    folders = [os.path.basename(os.path.dirname(path)) for path in images]
    return _samples(columns, images, [("",)] * len(images), folders, folders)


def _refuse_two_in_one_folder(source: str, metadata: list[str]) -> None:
    for folder, count in Counter(os.path.dirname(path) for path in metadata).items():
        if count > 1:
            names = " and ".join(os.path.basename(path) for path in metadata if os.path.dirname(path) == folder)
            raise UserError(f"{source} has {names} in the folder `{folder}`: keep one, or images count twice.")


def _refuse_images_without_row(source: str, images: list[str], rows: list[str]) -> None:
    known = {os.path.normpath(path) for path in rows}
    missing = [path for path in images if os.path.normpath(path) not in known]
    if missing:
        raise UserError(
            f"{source} has {len(missing)} of {len(images)} images without a row in a metadata file, the first is "
            f"`{missing[0]}`. Add their rows or move them away."
        )


def _read_metadata(path: str, columns: Columns) -> Samples:
    rows, features = _stream_rows(path, columns)
    names = []
    for number, row in enumerate(rows):
        if row[columns.image] is None or not row[columns.image].get("path"):
            raise UserError(f"row {number} of `{path}` names no image file: give it a `file_name`.")
        names.append(os.path.join(os.path.dirname(path), row[columns.image]["path"]))
    where = [f"row {number} of `{path}` (`{os.path.basename(name)}`)" for number, name in enumerate(names)]
    values = {column: [row[column] for row in rows] for column in features}
    captions, labels = text_columns(columns, values, features, where)
    classes, _ = class_column(columns, values, features, where)
    return Samples(FileReader(()), tuple(names), captions, labels, classes)


def _stream_rows(path: str, columns: Columns) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a metadata file, whose images are named relative to its folder, and the columns' features."""
    try:
        # Streaming writes no table into the cache of `datasets`, whose key (path and modification time) may be stale.
        # It still locks the cache, and `--cache_dir` may be read-only.
        with quiet_datasets(), tempfile.TemporaryDirectory() as cache:
            folder = without_colons(os.path.dirname(os.path.abspath(path)), cache)
            pattern = glob.escape(os.path.join(folder, os.path.basename(path)))
            stream = datasets.load_dataset(
                "imagefolder", data_files={"train": [pattern]}, split="train", streaming=True, cache_dir=cache
            )
            features = dict(stream.features)
            columns.check(list(features), f"`{path}`")
            wanted = {columns.image, *columns.named}
            if not isinstance(features[columns.image], datasets.Image):
                raise UserError(
                    f"`--image_column {columns.image}` holds no images in `{path}` (`image` usually does)."
                )
            stream = stream.select_columns(sorted(wanted)).cast_column(columns.image, datasets.Image(decode=False))
            rows = list(stream)
            for row in rows:
                if row[columns.image] is not None and row[columns.image].get("path"):
                    row[columns.image]["path"] = os.path.relpath(row[columns.image]["path"], folder)
            return rows, {column: features[column] for column in sorted(wanted)}
    except UserError:
        raise
    except Exception as error:  # pandas, pyarrow and datasets raise all kinds of errors
        raise UserError(f"`{path}` cannot be read: {_why(path, columns, error)}.") from error


def _why(path: str, columns: Columns, error: Exception) -> str:
    """Returns the metadata file's first bad line if it can be found, else the library's own message."""
    if isinstance(error, IndexError):  # what `datasets` raises for a table without rows
        return "it has no rows"
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if path.endswith(".jsonl") else []
    kinds = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as bad:
            return f"line {number} is not JSON ({bad.msg}); a line looks like {_EXAMPLE}"
        if not isinstance(row, dict) or "file_name" not in row:
            return f"line {number} has no `file_name`; a line looks like {_EXAMPLE}"
        caption = row.get(columns.caption, "") if columns.caption else ""
        if not isinstance(caption, str | list):
            return f"line {number} has {caption!r} in `--caption_column {columns.caption}`, which is not text"
        kinds.add(type(caption))
        if len(kinds) > 1:
            return f"line {number} mixes texts and lists in `--caption_column {columns.caption}`; write all as lists"
    return one_line(error).rstrip(".")
