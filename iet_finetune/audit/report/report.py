"""The report of an audit as one self-contained HTML page: images inline, no scripts, nothing fetched."""

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from ...files import written_beside
from . import report_parts as parts
from .catalogue import describe
from .record import AuditRecord, ClosestPair
from .verdict import BAD, GOOD, OPEN, PLAIN, verdict

if TYPE_CHECKING:
    from .comparison import Comparison, Difference, Row

NAME = "report.html"
# Names of local files and folders stand between these two, so that a push can remove them.
LOCAL_BEGINS, LOCAL_ENDS = "<!-- local begins -->", "<!-- local ends -->"
# Sides in pixels: larger images than the first are scaled down; up to the second, pixels are shown as they are.
LARGEST, SMALL = 256, 96
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
    folder.mkdir(parents=True, exist_ok=True)
    cards = [_card(number, pair, images_of) for number, pair in enumerate(pairs, 1)]
    with written_beside(folder / NAME) as partial:
        # JSON may hold a lone surrogate, which UTF-8 cannot: it becomes a question mark.
        partial.write_text(report_page(audit, cards, command), encoding="utf-8", errors="replace")
    return folder / NAME


def report_page(audit: AuditRecord, cards: Sequence[Mapping[str, Any]] = (), command: str | None = None) -> str:
    """The page of an audit, with the pairs that are shown in it."""
    return _template("report.html.jinja").render(
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
    return _template("compare.html.jinja").render(
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


def embedded(image: Image.Image) -> dict[str, Any]:
    """An image for the page: a data URI, its size, and whether the page enlarges it pixel by pixel.

    Small ones are kept exactly (PNG); others are fitted into 256 pixels (JPEG).
    """
    image, stream = image.convert("RGB"), io.BytesIO()
    small = max(image.size) <= SMALL
    if small:
        image.save(stream, "PNG", optimize=True)
    else:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        image.save(stream, "JPEG", quality=88)
    kind, content = "png" if small else "jpeg", base64.b64encode(stream.getvalue()).decode("ascii")
    return {
        "uri": f"data:image/{kind};base64,{content}",
        "width": image.width,
        "height": image.height,
        "small": small,
    }


@cache
def _environment() -> Environment:
    # Everything in an audit is untrusted text, captions above all, and is escaped.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = _words
    environment.globals |= {"local_begins": Markup(LOCAL_BEGINS), "local_ends": Markup(LOCAL_ENDS)}
    return environment


def _words(text: str) -> Markup:
    """Escaped text: backticks mark code, and no line breaks before a `%`."""
    tight = re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", str(escape(text)))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", tight))


def _template(name: str) -> Any:
    return _environment().get_template(name)
