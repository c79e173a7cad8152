"""Rows of CSV, JSON and parquet files: the values as they stand there, of the columns that are asked for."""

import codecs
import csv
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from ..errors import UserError, one_line
from .faults import EXAMPLE, shown
from .files import kind_of

SEPARATORS = (",", ";", "\t", "|")
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Called with the number of a line or row, from 1, and what is wrong with it.
Refuse = Callable[[int, str], None]


class Line(NamedTuple):
    """One row: the number of its line in a text, else of the row, from 1; and its values by column."""

    number: int
    values: Mapping[str, Any]


class TextTable(NamedTuple):
    """A file's rows.

    Attributes:
        columns: all columns of the file.
        lines: the rows, with the columns that were asked for alone.
        typed: whether numbers can be told from texts; in a CSV file all is text.
    """

    columns: list[str]
    lines: list[Line]
    typed: bool


def read_text_table(path: str, asked: Collection[str], refuse: Refuse) -> TextTable:
    """Reads a table; nothing is made of a value that its format does not say.

    Args:
        asked: the columns to read, if they are there.
        refuse: is told of rows that cannot be read.

    Raises:
        UserError: the file as a whole cannot be read; names it.
    """
    kind = kind_of(path)
    reads = {".parquet": _read_parquet, ".jsonl": _read_json_lines, ".json": _read_json}
    refused = []

    def refuse_one(number: int, why: str) -> None:
        refused.append(number)
        refuse(number, why)

    try:
        table = reads.get(kind, _read_csv)(path, frozenset(asked), refuse_one)
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror or one_line(error)}.") from None
    except UnicodeError:
        raise UserError(f"`{path}` cannot be read: {_bad_byte(path)}.") from None
    if not table.lines and not refused:
        raise UserError(f"`{path}` cannot be read: it has no rows.")
    return table


def read_text(path: str) -> str:
    """Reads a text file, whatever its byte-order mark says that it is written in.

    Raises:
        UserError: it cannot be read; names it.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        return data.decode(_encoding_of(path, data))
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror}.") from None
    except UnicodeError:
        raise UserError(f"`{path}` cannot be read: {_bad_byte(path)}.") from None


def _encoding(path: str) -> str:
    """How a text is written: as its byte-order mark says, else UTF-8.

    Raises:
        UserError: it has zero bytes, which no text in UTF-8 has.
    """
    with open(path, "rb") as file:
        return _encoding_of(path, file.read(4096))


def _encoding_of(path: str, start: bytes) -> str:
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding
    if b"\0" in start[:4096]:
        raise UserError(
            f"`{path}` cannot be read: it has zero bytes, as UTF-16 without a byte-order mark has: save it as UTF-8."
        )
    return "utf-8"


def _bad_byte(path: str) -> str:
    """Where a text is not what it is taken for."""
    encoding = _encoding(path)
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as error:
                if encoding == "utf-8":
                    byte = line[error.start]
                    return (
                        f"line {number} has the byte 0x{byte:02x}, which is not UTF-8 (it may be Latin-1 or "
                        "Windows-1252): save it as UTF-8"
                    )
    return f"it is not {encoding.upper()}, as its byte-order mark says: save it as UTF-8"


def _read_json_lines(path: str, asked: frozenset[str], refuse: Refuse) -> TextTable:
    columns: dict[str, None] = {}
    lines = []
    with open(path, encoding=_encoding(path)) as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                values = _loads(text)
            except json.JSONDecodeError as error:
                refuse(number, f"is not JSON ({error.msg})")
                continue
            if not isinstance(values, dict):
                refuse(number, "is not a row of names and values")
                continue
            if not columns.keys() >= values.keys():
                columns.update(dict.fromkeys(values))
            lines.append(Line(number, {name: value for name, value in values.items() if name in asked}))
    return TextTable([*columns], lines, typed=True)


# Numbers keep the form they are written in.
_loads = json.JSONDecoder(parse_float=str, parse_constant=str).decode


def _read_json(path: str, asked: frozenset[str], refuse: Refuse) -> TextTable:
    """A list of rows; or rows, or captions, by the names of their images."""
    try:
        rows = _loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"`{path}` cannot be read: line {error.lineno} is not JSON ({error.msg}). Write a list of rows such as "
            f"{EXAMPLE}, or call it metadata.jsonl if each line is a row."
        ) from None
    if isinstance(rows, dict):
        rows = [
            {"file_name": name, **value} if isinstance(value, dict) else {"file_name": name, "text": value}
            for name, value in rows.items()
        ]
    if not isinstance(rows, list):
        raise UserError(f"`{path}` cannot be read: it is not a list of rows such as {EXAMPLE}.")
    columns: dict[str, None] = {}
    lines = []
    for number, values in enumerate(rows, start=1):
        if isinstance(values, dict):
            columns.update(dict.fromkeys(values))
            lines.append(Line(number, {name: values[name] for name in asked & values.keys()}))
        else:
            refuse(number, "is not a row of names and values")
    return TextTable([*columns], lines, typed=True)


def _read_csv(path: str, asked: frozenset[str], refuse: Refuse) -> TextTable:
    with _long_fields(), open(path, encoding=_encoding(path), newline="") as file:
        first = file.readline()
        separator = _separator(path, first, asked)
        padded = any(name != name.strip() for name in next(csv.reader([first], delimiter=separator), []))
        reader = csv.reader(chain([first], file), delimiter=separator, skipinitialspace=padded)
        try:
            header = [name.strip() for name in next(reader, [])]
            wanted = [(place, name) for place, name in enumerate(header) if name in asked]
            lines = list(_csv_lines(reader, len(header), wanted, refuse))
        except csv.Error as error:
            raise UserError(f"`{path}` cannot be read: line {reader.line_num}: {one_line(error)}.") from None
    return TextTable(header, lines, typed=False)


def _csv_lines(reader: Any, fields: int, wanted: list[tuple[int, str]], refuse: Refuse) -> Iterator[Line]:
    for row in reader:
        if not row:
            continue
        if len(row) == fields:
            yield Line(reader.line_num, {name: row[place] for place, name in wanted})
        else:
            hint = ": texts with the separator in them need quotes" if len(row) > fields else ""
            refuse(reader.line_num, f"has {len(row)} fields instead of {fields}{hint}")


def _separator(path: str, header: str, asked: frozenset[str]) -> str:
    """The character between the columns: the one that makes names of the header which are asked for.

    Raises:
        UserError: none does; says what the header is.
    """
    for separator in (*((",",) if kind_of(path) == ".csv" else ("\t",)), *SEPARATORS):
        names = {name.strip() for name in next(csv.reader([header], delimiter=separator), [])}
        if names & asked and (len(names) > 1 or not any(other in header for other in SEPARATORS)):
            return separator
    return ","


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lets fields be of any length; columns nobody asked for may hold whole documents."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: str, asked: frozenset[str], refuse: Refuse) -> TextTable:
    try:
        # Opened here: of a name, pyarrow would take `a:b` for an address.
        with open(path, "rb") as stream, pyarrow.parquet.ParquetFile(stream) as file:
            columns = file.schema_arrow.names
            rows = file.read([name for name in columns if name in asked]).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"`{path}` cannot be read: {one_line(error)}.") from None
    return TextTable(columns, [Line(number, row) for number, row in enumerate(rows, start=1)], typed=True)


def headers_of(paths: list[str]) -> str:
    """What tables that go by other names hold, for a message; only their first lines are read."""
    told = []
    for path in paths:
        name = os.path.basename(path)
        try:
            columns = _header(path)
        except (UserError, OSError, UnicodeError, pyarrow.ArrowException, json.JSONDecodeError):
            columns = []
        told.append(f"{name} (columns {', '.join(columns)})" if columns else name)
    return shown(told, 3)


def _header(path: str) -> list[str]:
    kind = kind_of(path)
    if kind == ".parquet":
        with open(path, "rb") as stream:
            return pyarrow.parquet.read_schema(stream).names
    with open(path, encoding=_encoding(path), newline="") as file:
        first = file.readline(10_000)
    if kind in (".csv", ".tsv"):
        separator = max(SEPARATORS, key=first.count)
        return [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
    row = json.loads(first)
    return [*row] if isinstance(row, dict) else []
