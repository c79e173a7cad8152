"""The samples of a source: how to read their bytes, and their names, captions and labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError
from .faults import BAD_ROW, NO_CAPTION, NO_VALUE, Faults
from .hashes import file_stamp

# What `--caption_column`, if it is left at its default, is called too.
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description")


@dataclass(frozen=True)
class Columns:
    """The columns to read; `caption`, `label` and `class_` are None if not needed.

    `default_caption` and, if `from_folder`, the name of an image's folder are the captions of images without others.
    """

    image: str
    caption: str | None
    label: str | None
    class_: str | None = None
    default_caption: str | None = None
    from_folder: bool = False

    def check(self, present: list[str], source: str) -> None:
        """Raises a `UserError` that names the flag of the first column missing from `present`."""
        for flag, column in self._by_flag.items():
            if column is not None and column not in present:
                raise UserError(f"`--{flag} {column}` is no column of {source}, which has: {', '.join(present)}.")

    def captions_in(self, present: Sequence[str]) -> str | None:
        """The column of captions among those that are present; `caption` if none is, and None if not needed."""
        if self.caption != CAPTION_COLUMNS[0]:
            return self.caption
        return next((name for name in CAPTION_COLUMNS if name in present), self.caption)

    @property
    def named(self) -> list[str]:
        """The columns to read besides the images, each once, sorted."""
        return sorted({column for column in (self.caption, self.label, self.class_) if column is not None})

    @property
    def _by_flag(self) -> dict[str, str | None]:
        return {
            "image_column": self.image,
            "caption_column": self.caption,
            "shard_by_column": self.label,
            "class_column": self.class_,
        }


class Reader(Protocol):
    """Reads encoded images; picklable."""

    def __call__(self, index: int) -> bytes:
        """Returns the encoded bytes of an image; raises a `UserError` if it cannot be read."""

    def stamp(self, index: int) -> str | None:
        """Returns a text that differs whenever the image's bytes may; None if there is none. Reads no image."""


@dataclass(frozen=True)
class Samples:
    """A source's samples in order: `read(index)` returns an image's encoded bytes, the rest has one entry a sample.

    `classes` are numbers, or texts to be numbered; `class_names` are the names of numbers, if there are any. `notes`
    say what was made of the source.
    """

    read: Reader
    names: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...] | None
    classes: tuple[int | str, ...] | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileReader:
    """Reads the encoded bytes of image files."""

    paths: tuple[str, ...]

    def __call__(self, index: int) -> bytes:
        return read_file(self.paths[index])

    def stamp(self, index: int) -> str | None:
        """As `Reader.stamp`."""
        return file_stamp(self.paths[index])


def read_file(path: str) -> bytes:
    """Reads a file.

    Raises:
        UserError: the file is missing or cannot be read; names it.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"image `{path}` cannot be read: {error.strerror}. Put it back, or remove its row from the data."
        ) from None


def captions_of(value: Any) -> tuple[str, ...] | None:
    """Returns the captions of a sample; None if it has none.

    Raises:
        ValueError: one is not text, nor a whole number or a truth value, which a parser may have made of it.
    """
    if isinstance(value, str):
        return (value,)
    if value is None or value == []:
        return None
    return tuple(_as_text(text) for text in (value if isinstance(value, list | tuple) else [value]))


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int):
        raise ValueError(f"has {value!r:.40}, which is not text,")
    return str(value)


def label_of(value: Any, feature: Any, where: str, column: str) -> str:
    """Returns a label as text; for a `datasets.ClassLabel`, the name of the class.

    Raises:
        UserError: `value` is missing or not a single text, number or boolean.
    """
    if not isinstance(value, str | int | float | bool):
        raise UserError(f"{where} has {value!r:.40} in `--shard_by_column {column}`: every image needs one value.")
    if hasattr(feature, "int2str") and isinstance(value, int):
        return feature.int2str(value) if value >= 0 else str(value)
    return str(value)


def class_of(value: Any, where: str, column: str) -> int | str:
    """Returns a class as in the data: a number from 0, or a text.

    Raises:
        UserError: `value` is neither.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where} has {value!r:.40} in `--class_column {column}`: give a whole number or a text.")
    if isinstance(value, int) and value < 0:
        raise UserError(f"{where} has {value} in `--class_column {column}`: every image needs a class, from 0.")
    return value


def numbered(
    values: Sequence[int | str], names: tuple[str, ...] | None, column: str
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns the class number of each sample and the name of each class.

    Numbers are kept and are their own names by default; texts are numbered in sorted order.

    Args:
        values: all numbers or all texts.
        names: names of the numbers, if any.

    Raises:
        UserError: `values` mixes numbers and texts.
    """
    numbers = [value for value in values if isinstance(value, int)]
    texts = sorted({value for value in values if isinstance(value, str)})
    if numbers and texts:
        raise UserError(
            f"`--class_column {column}` has numbers and texts, such as {numbers[0]} and {texts[0]!r:.40}: "
            "write all in one way."
        )
    if texts:
        number_of = {text: number for number, text in enumerate(texts)}
        return tuple(number_of[str(value)] for value in values), tuple(texts)
    return tuple(numbers), names or tuple(str(number) for number in range(max(numbers, default=-1) + 1))


def class_column(
    columns: Columns, values: Mapping[str, list[Any]], features: Mapping[str, Any], names: list[str], faults: Faults
) -> tuple[tuple[int | str, ...] | None, tuple[str, ...] | None]:
    """Returns the samples' classes as in the data and the names of a `datasets.ClassLabel`, as in `Samples`.

    Takes the arguments of `text_columns`.
    """
    if columns.class_ is None:
        return None, None
    classes: list[int | str] = []
    for value, name in zip(values[columns.class_], names, strict=True):
        try:
            classes.append(class_of(value, name, columns.class_))
        except UserError as error:
            faults.add(NO_VALUE, str(error))
    class_names = getattr(features[columns.class_], "names", None)
    return tuple(classes), None if class_names is None else tuple(class_names)


def text_columns(
    columns: Columns, values: Mapping[str, list[Any]], features: Mapping[str, Any], names: list[str], faults: Faults
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...] | None]:
    """Returns captions and labels of all samples; without a caption column every caption is empty.

    Args:
        values: column -> one entry per sample.
        features: the columns' `datasets` features.
        names: the samples' names in errors.
        faults: is told of what is missing or no text.
    """
    captions: tuple[tuple[str, ...], ...] = (("",),) * len(names)
    labels: list[str] = []
    if columns.caption is not None:
        given = values.get(columns.caption, [None] * len(names))
        captions = tuple(_caption(value, name, columns, faults) for value, name in zip(given, names, strict=True))
    column = columns.label or ""
    for value, name in zip(values[column], names, strict=True) if column else ():
        try:
            labels.append(label_of(value, features[column], name, column))
        except UserError as error:
            faults.add(NO_VALUE, str(error))
    return captions, tuple(labels) if column else None


def _caption(value: Any, name: str, columns: Columns, faults: Faults) -> tuple[str, ...]:
    try:
        captions = captions_of(value)
    except ValueError as error:
        faults.add(BAD_ROW, f"{name} {error} in `--caption_column {columns.caption}`")
        return ("",)
    if columns.default_caption is not None and not any(text.strip() for text in captions or ()):
        return (columns.default_caption,)
    if captions is None:
        faults.add(NO_CAPTION, name)
    return captions or ("",)
