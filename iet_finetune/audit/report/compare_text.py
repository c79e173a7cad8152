"""A comparison as a table for the terminal."""

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .catalogue import Entry, describe

if TYPE_CHECKING:
    from .comparison import Comparison, Row

WIDTH = 100
_TITLE = 25
# Of each row, of each audit: the value, and its difference to the first audit's.
Cells = list[list[tuple[str, str]]]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def as_text(comparison: "Comparison") -> str:
    """The metrics with their 95 % intervals, and below each its difference to the first audit's.

    Up to three audits stand side by side in 100 columns, more of them below each other.
    """
    names = _names(len(comparison.labels))
    lines = [*_legend(comparison, names), ""]
    rows = [row for row in comparison.rows if not describe(row.name).is_other_cut] or list(comparison.rows)
    cells = [[_cells(describe(row.name), row, number) for number in range(len(names))] for row in rows]
    width = max(len(text) for row in cells for cell in row for text in cell)
    side_by_side = _TITLE + len(names) * (width + 1) <= WIDTH
    lines += _side_by_side(rows, names, cells, width) if side_by_side else _by_metric(rows, names, cells)
    where = "Second line" if side_by_side else "Behind it"
    lines += ["", f"In brackets 95 % intervals. {where}: difference to A; * where its interval excludes 0."]
    if left_out := len(comparison.rows) - len(rows):
        lines.append(
            f"{left_out} more metrics, other thresholds and percentiles, are in compare.json and compare.html."
        )
    for warning in comparison.warnings:
        lines += _wrapped(f"Not the same conditions: {_printable(warning)}")
    return "\n".join(lines)


def _names(count: int) -> list[str]:
    return list(_LETTERS[:count]) if count <= len(_LETTERS) else [f"#{number + 1}" for number in range(count)]


def _legend(comparison: "Comparison", names: list[str]) -> Iterator[str]:
    for name, label, audit in zip(names, comparison.labels, comparison.audits, strict=True):
        images = audit.data.generated_images
        pieces = [label, audit.date, None if images is None else f"{images:,} generated images"]
        yield textwrap.shorten(_printable(f"{name}  {', '.join(filter(None, pieces))}"), WIDTH, placeholder=" …")


def _cells(entry: Entry, row: "Row", number: int) -> tuple[str, str]:
    """A value, and its difference to the first audit's."""
    metric, difference = row.values[number], row.differences[number]
    shown = "-" if metric is None else f"{entry.show(metric.value)} {_brackets(entry, metric.low, metric.high)}"
    if difference is None:
        return shown, ""
    sign = "+" if difference.value > 0 and entry.number(difference.value).strip("0.,") else ""
    apart = f"{sign}{entry.number(difference.value)} {_brackets(entry, difference.low, difference.high)}"
    return shown, apart + (" *" if difference.clear else "")


def _brackets(entry: Entry, low: float, high: float) -> str:
    return f"[{entry.number(low)}, {entry.number(high)}]"


def _side_by_side(rows: "list[Row]", names: list[str], cells: Cells, width: int) -> Iterator[str]:
    yield (" " * _TITLE + "".join(f" {name:<{width}}" for name in names)).rstrip()
    for row, each in zip(rows, cells, strict=True):
        title = textwrap.wrap(describe(row.name).title, _TITLE - 1)
        values = list(zip(*each, strict=True))
        for number in range(max(len(title), 2)):
            beside = values[number] if number < len(values) else ()
            left = title[number] if number < len(title) else ""
            yield (f"{left:<{_TITLE}}" + "".join(f" {text:<{width}}" for text in beside)).rstrip()


def _by_metric(rows: "list[Row]", names: list[str], cells: Cells) -> Iterator[str]:
    longest = max(len(value) for row in cells for value, _ in row)
    for row, each in zip(rows, cells, strict=True):
        yield describe(row.name).title
        for name, (value, apart) in zip(names, each, strict=True):
            yield f"  {name:<3} {value:<{longest}}  {apart}".rstrip()


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def _printable(text: str) -> str:
    """Text without control characters."""
    return "".join(each if each.isprintable() else "?" for each in text)
