"""The samples of a source before they are hashed: how to read their bytes, their names, captions and labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class Columns:
    """The columns to read; `caption` and `label` are None where they are not wanted."""

    image: str
    caption: str | None
    label: str | None

    def check(self, present: list[str], source: str) -> None:
        """Raise a `UserError` naming the flag of the first wanted column that is not among those `present`."""
        wanted = {"image_column": self.image, "caption_column": self.caption, "shard_by_column": self.label}
        for flag, column in wanted.items():
            if column is not None and column not in present:
                raise UserError(f"`--{flag} {column}` is no column of {source}, which has: {', '.join(present)}.")


@dataclass(frozen=True)
class Samples:
    """A source's samples in order: `read(index)` gives an image's encoded bytes, the rest one entry a sample."""

    read: Callable[[int], bytes]
    names: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...] | None


@dataclass(frozen=True)
class FileReader:
    """Reads the encoded bytes of image files."""

    paths: tuple[str, ...]

    def __call__(self, index: int) -> bytes:
        return read_file(self.paths[index])


def read_file(path: str) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: there is no such file, or it cannot be read; names it.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"image `{path}` cannot be read: {error.strerror}. Put it back, or remove its row from the data."
        ) from None


def captions_of(value: Any, where: str, column: str) -> tuple[str, ...]:
    """A caption, or several of which one is drawn, as a tuple; `where` is what the error calls the sample.

    Raises:
        UserError: `value` is neither text nor a non-empty list of texts.
    """
    texts = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not texts:
        raise UserError(f"{where} has an empty list in `--caption_column {column}`: give at least one caption.")
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        found = "no caption" if wrong[0] is None else f"{wrong[0]!r:.40}, which is not text,"
        raise UserError(f"{where} has {found} in `--caption_column {column}`: every image needs text.")
    return texts


def label_of(value: Any, feature: Any, where: str, column: str) -> str:
    """The text of a label; a `datasets.ClassLabel` gives the name of its class.

    Raises:
        UserError: `value` is missing or not a single text, number or truth value.
    """
    if not isinstance(value, str | int | float | bool):
        raise UserError(f"{where} has {value!r:.40} in `--shard_by_column {column}`: every image needs one value.")
    if hasattr(feature, "int2str") and isinstance(value, int):
        return feature.int2str(value) if value >= 0 else str(value)
    return str(value)


def text_columns(
    columns: Columns, values: Mapping[str, list[Any]], features: Mapping[str, Any], names: list[str]
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...] | None]:
    """Captions and labels of all samples; without a caption column each caption is empty.

    Args:
        values: the wanted columns by name, one entry a sample.
        features: the columns' `datasets` features.
        names: what errors call the samples.
    """
    captions: tuple[tuple[str, ...], ...] = (("",),) * len(names)
    labels = None
    if columns.caption is not None:
        pairs = zip(values[columns.caption], names, strict=True)
        captions = tuple(captions_of(value, name, columns.caption) for value, name in pairs)
    if columns.label is not None:
        pairs = zip(values[columns.label], names, strict=True)
        labels = tuple(label_of(value, features[columns.label], name, columns.label) for value, name in pairs)
    return captions, labels
