"""The report of an audit as one self-contained HTML page."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...pages.page import embedded, render, write_page
from . import report_parts as parts
from .catalogue import describe
from .record import AuditRecord, ClosestPair
from .tones import BAD, GOOD, OPEN, PLAIN
from .verdict import verdict

if TYPE_CHECKING:
    from .comparison import Comparison, Difference, Row

NAME = "report.html"
HERE = Path(__file__).parent
# Pairs that are shown at once; the others are folded.
FIRST_PAIRS = 12
_TONES = {BAD: "Memorization", GOOD: "None found", OPEN: "Not clear", PLAIN: "Note"}

ImagesOf = Callable[[ClosestPair], tuple[Image.Image, Image.Image]]


def write_report(
    folder: Path, audit: AuditRecord, pairs: Sequence[ClosestPair], images_of: ImagesOf, command: str | None = None
) -> Path:
    """Writes `report.html` into a folder, which is made, and returns its path.

    Args:
        folder: of the audit.
        audit: what it measured.
        pairs: in the order in which they are shown; captions and names are in them.
        images_of: returns the generated and the training image of a pair.
        command: the line that repeats the audit.
    """
    cards = [_card(number, pair, images_of) for number, pair in enumerate(pairs, 1)]
    return write_page(folder / NAME, report_page(audit, cards, command))


def report_page(audit: AuditRecord, cards: Sequence[Mapping[str, Any]] = (), command: str | None = None) -> str:
    """The page of an audit, with the pairs that are shown in it."""
    return render(
        HERE / "report.html.jinja",
        name=audit.model or "a local model",
        facts=parts.facts(audit),
        verdict=verdict(audit),
        tones=_TONES,
        tiles=parts.tiles(audit),
        groups=parts.groups(audit),
        repeats=parts.repeats(audit),
        charts=parts.charts(audit),
        pairs=cards,
        first=FIRST_PAIRS,
        warnings=[parts.sentence(warning) for warning in audit.warnings],
        not_measured=[(describe(name).title, parts.sentence(why)) for name, why in audit.not_measured.items()],
        command=command,
        conditions=parts.conditions(audit),
        sources=parts.sources(audit),
    )


def comparison_page(comparison: "Comparison") -> str:
    """The page for audits side by side."""
    rows = [_compared_row(row) for row in comparison.rows]
    return render(
        HERE / "compare.html.jinja",
        labels=comparison.labels,
        warnings=[parts.sentence(warning) for warning in comparison.warnings],
        groups=parts.by_group(rows),
    )


def _compared_row(row: "Row") -> dict[str, Any]:
    entry = describe(row.name)
    return {
        "group": entry.group,
        "minor": entry.is_other_cut,
        "title": entry.title,
        "direction": entry.direction,
        "cells": [_compared(row, number) for number in range(len(row.values))],
    }


def _compared(row: "Row", number: int) -> dict[str, Any]:
    """The value of one audit, and its difference to the first's."""
    entry, metric, apart = describe(row.name), row.values[number], row.differences[number]
    if metric is None:
        return {"value": ""}
    shown = {"value": entry.show(metric.value), "interval": entry.interval(metric.low, metric.high)}
    if apart is None:
        return shown | {"difference": ""}
    way = "higher" if apart.value > 0 else "lower"
    size = entry.number(abs(apart.value)) + (" points" if entry.percent else "")
    return shown | {
        "difference": f"{way} by {size}" if apart.clear else "no clear difference",
        "reach": f"difference {entry.interval(apart.low, apart.high)}",
        "tone": _tone(apart, entry.better),
    }


def _tone(apart: "Difference", better: str | None) -> str:
    if not apart.clear or better is None:
        return "quiet"
    return "better" if (apart.value > 0) == (better == "higher") else "worse"


def _card(number: int, pair: ClosestPair, images_of: ImagesOf) -> dict[str, Any]:
    """A pair as the template shows it."""
    generated, training = images_of(pair)
    return {
        "number": number,
        "generated": embedded(generated),
        "training": embedded(training),
        "prompt": pair.prompt,
        "caption": pair.training_caption,
        "same": bool(pair.prompt) and pair.prompt == pair.training_caption,
        "facts": parts.pair_facts(pair),
        "files": parts.pair_files(pair),
    }
