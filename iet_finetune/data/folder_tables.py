"""The tables of a folder of images: which row is of which image, and what it says of it."""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import UserError
from .faults import BAD_ROW, EXAMPLE, MISSING, TWO_CAPTIONS, Faults
from .files import Files
from .samples import CAPTION_COLUMNS, Columns, captions_of
from .text_tables import Line, TextTable, read_text, read_text_table

# What a column of file names is called, where it is not `--image_column`.
FILE_COLUMNS = ("file_name", "filename", "file_path", "image_file", "image_path", "file", "path", "img")
_WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]*")


class ImageRow(NamedTuple):
    """What a table says of one image.

    Attributes:
        path: of the image, as it is known.
        table, line, named: the path of the table, the number of the line or row, and how it names the image.
        captions: texts; None if the row has none, or none are asked for.
        label, class_: the values of `--shard_by_column` and `--class_column`; None if not asked for.
    """

    path: str
    table: str
    line: int
    named: str
    captions: tuple[str, ...] | None
    label: Any
    class_: Any

    @property
    def where(self) -> str:
        """The row in errors."""
        return _where(self.table, self.line)

    @property
    def words(self) -> str:
        """The row, and what it is of, in errors."""
        return f"{self.where} (`{self.named}`)"


def _where(table: str, line: int) -> str:
    return f"{'row' if table.endswith('.parquet') else 'line'} {line} of `{os.path.basename(table)}`"


def table_rows(files: Files, columns: Columns, faults: Faults) -> list[ImageRow]:
    """The rows of all tables of a folder, each image once, unless a table has several rows of it.

    Args:
        faults: is told of rows that are wrong, of files that are not there, and of images of which two tables, or two
            names of a file, say different things.

    Raises:
        UserError: a table cannot be read, or lacks a column; names it.
    """
    finder = _Finder(files)
    # Without its column of captions a table may say something else of images whose captions are elsewhere.
    elsewhere = bool(files.texts) or columns.default_caption is not None or columns.from_folder
    rows = [row for path in files.tables for row in _rows_of(path, columns, finder, faults, elsewhere)]
    return list(_once(rows, faults))


def _rows_of(
    path: str, columns: Columns, finder: "_Finder", faults: Faults, captions_elsewhere: bool
) -> Iterator[ImageRow]:
    folder, name = os.path.split(path)
    table = read_text_table(path, _asked(columns), _refusing(name, faults))
    file_column, caption_column = _file_column(path, table, columns), columns.captions_in(table.columns)
    _check_columns(path, table, columns, file_column, None if captions_elsewhere else caption_column)
    numbers = not table.typed and _all_whole_numbers(table.lines, columns.class_)
    for number, values in table.lines:
        named = values.get(file_column)
        if not isinstance(named, str) or not named.strip():
            faults.add(BAD_ROW, f"{_where(path, number)} names no image file")
            continue
        image = finder.find(folder, named.strip())
        if image is None:
            faults.add(MISSING, f"`{named}` in {_where(path, number)}{finder.alike(named)}")
            continue
        captions = None
        if caption_column is not None:
            try:
                captions = captions_of(values.get(caption_column))
            except ValueError as error:
                where = f"{_where(path, number)} (`{named}`)"
                faults.add(BAD_ROW, f"{where} {error} in `--caption_column {caption_column}`")
                captions = ("",)
        class_ = values.get(columns.class_) if columns.class_ else None
        label = values.get(columns.label) if columns.label else None
        yield ImageRow(image, path, number, named.strip(), captions, label, int(str(class_)) if numbers else class_)


def _asked(columns: Columns) -> set[str]:
    synonyms = CAPTION_COLUMNS if columns.caption == CAPTION_COLUMNS[0] else ()
    return {columns.image, *_file_columns(columns), *columns.named, *synonyms}


def _file_columns(columns: Columns) -> list[str]:
    """What a column of file names may be called, the most telling name first.

    `datasets` makes of a column `NAME_file_name` images called NAME.
    """
    return [FILE_COLUMNS[0], columns.image, f"{columns.image}_{FILE_COLUMNS[0]}", *FILE_COLUMNS[1:]]


def _refusing(path: str, faults: Faults) -> Any:
    return lambda number, why: faults.add(BAD_ROW, f"line {number} of `{path}` {why}")


def _file_column(path: str, table: TextTable, columns: Columns) -> str:
    """The column of file names; the first of all if no row could be read."""
    if not table.columns:
        return FILE_COLUMNS[0]
    named = [name for name in _file_columns(columns) if name in table.columns]
    if not named:
        raise UserError(
            f"`{path}` has no column `file_name`, which names the images; it has: {', '.join(table.columns)}. "
            f"A row looks like {EXAMPLE}."
        )
    return named[0]


def _check_columns(
    path: str, table: TextTable, columns: Columns, file_column: str, caption_column: str | None
) -> None:
    if not table.columns:
        return
    # As in `datasets`, the images are a column called `image`, or what stands before `_file_name`.
    ending = f"_{FILE_COLUMNS[0]}"
    images = file_column.removesuffix(ending) if file_column.endswith(ending) else "image"
    present = [images, *(name for name in table.columns if name != file_column)]
    if columns.image != file_column and columns.image not in present:
        columns.check(present, f"`{path}`")
    Columns(images, caption_column, columns.label, columns.class_).check(present, f"`{path}`")


def _all_whole_numbers(lines: Iterable[Line], column: str | None) -> bool:
    """Whether a text file's column holds class numbers: whole numbers alone, as they are usually written."""
    return column is not None and all(_WHOLE_NUMBER.fullmatch(line.values.get(column) or "") for line in lines)


def _once(rows: Sequence[ImageRow], faults: Faults) -> Iterator[ImageRow]:
    """Leaves out rows that reach an image by another table or name than its first row, if they say the same."""
    if len({row.path for row in rows}) == len(rows):
        yield from rows
        return
    first: dict[str, tuple[str, str]] = {}
    said: dict[tuple[str, tuple[str, str]], list[Any]] = {}
    for row in rows:
        way = (row.table, row.named)
        said.setdefault((row.path, way), []).append((row.captions, row.label, row.class_))
        if first.setdefault(row.path, way) == way:
            yield row
    for (path, way), sayings in said.items():
        if sayings != said[path, first[path]]:
            places = " and ".join(f"`{named}` in `{os.path.basename(table)}`" for table, named in (first[path], way))
            faults.add(TWO_CAPTIONS, f"`{os.path.basename(path)}`: {places}")


def read_texts(paths: Sequence[str]) -> tuple[str, ...]:
    """The captions of an image's text files: one a line; one empty caption if there is no line.

    Raises:
        UserError: a file cannot be read; names it.
    """
    lines = [line.strip() for path in paths for line in read_text(path).splitlines()]
    return tuple(dict.fromkeys(line for line in lines if line)) or ("",)


class _Finder:
    """Finds the images that rows name."""

    def __init__(self, files: Files) -> None:
        self._kept = files.kept

    def find(self, folder: str, name: str) -> str | None:
        """The image that a table in `folder` calls `name`; None if there is none.

        Names may differ in their Unicode normalisation, begin with the folder's own name, or have backslashes.
        """
        kept = self._kept.get(os.path.normpath(os.path.join(folder, name)))
        return kept if kept is not None else self._find_otherwise(folder, name)

    def _find_otherwise(self, folder: str, name: str) -> str | None:
        own, here = os.path.basename(os.path.abspath(folder)), name.replace("\\", "/")
        first, _, inside = here.removeprefix("./").partition("/")
        for each in (name, here, *([inside] if first == own and inside else [])):
            path = os.path.normpath(os.path.join(folder, each))
            path = self._by_normal_form.get(_normal(path), path)
            if path in self._kept:
                return self._kept[path]
            # It may lie outside of the folder that is trained on, or be reached by a link that leads back into it.
            if os.path.isfile(path):
                return self._by_real_path.get(os.path.realpath(path), path)
        return None

    def alike(self, name: str) -> str:
        """Words that show an image of the same name elsewhere, if there is just one."""
        base = _normal(os.path.basename(name.replace("\\", "/"))).casefold()
        found = self._by_base.get(base, [])
        return f" (there is `{found[0]}`)" if len(found) == 1 else ""

    @cached_property
    def _by_normal_form(self) -> dict[str, str]:
        return {_normal(path): path for path in self._kept}

    @cached_property
    def _by_real_path(self) -> dict[str, str]:
        return {os.path.realpath(path): path for path in self._kept.values()}

    @cached_property
    def _by_base(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in self._kept:
            found.setdefault(_normal(os.path.basename(path)).casefold(), []).append(path)
        return found


def _normal(path: str) -> str:
    return unicodedata.normalize("NFC", path)
