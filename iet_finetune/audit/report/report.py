"""The report of an audit as one HTML page, complete in itself: pictures inside, no script, nothing fetched."""

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
from .verdict import BAD, GOOD, OPEN, PLAIN, verdict

if TYPE_CHECKING:
    from .comparison import Comparison, Row
    from .differences import Difference

NAME = "report.html"
# What names files and folders of this machine stands between these two, so that it can be taken out of a copy.
LOCAL_BEGINS, LOCAL_ENDS = "<!-- local begins -->", "<!-- local ends -->"
# Sides of pictures in pixels: larger ones are made smaller; up to the second, each pixel is shown as it is.
LARGEST, SMALL = 256, 96
# Pairs that are seen without unfolding more.
FIRST_PAIRS = 12
_TONES = {BAD: "Memorization", GOOD: "None found", OPEN: "Not clear", PLAIN: "Note"}

Pictures = Callable[[dict[str, Any]], tuple[Image.Image, Image.Image]]


def write_report(folder: Path, audit: dict[str, Any], pairs: list[dict[str, Any]], picture: Pictures) -> Path:
    """Writes `report.html` into a folder, which is made, and returns its path.

    Args:
        folder: of the audit.
        audit: the content of audit.json.
        pairs: that of pairs.json, in the order in which they are shown; captions and names are in it.
        picture: gives the generated and the training image of a pair.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cards = [_card(number, pair, picture) for number, pair in enumerate(pairs, 1)]
    with written_beside(folder / NAME) as partial:
        # A lone surrogate, which JSON may hold, is no text that can be written: it becomes a question mark.
        partial.write_text(report_page(audit, cards), encoding="utf-8", errors="replace")
    return folder / NAME


def report_page(audit: Mapping[str, Any], cards: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page for the content of an audit.json, with the pairs that are shown in it."""
    return _template("report.html.jinja").render(
        name=audit.get("model") or "a local model",
        facts=parts.facts(audit),
        verdict=verdict(audit),
        tones=_TONES,
        tiles=parts.tiles(audit),
        groups=parts.groups(audit),
        repeats=parts.repeats(audit),
        charts=parts.charts(audit),
        pairs=cards,
        first=FIRST_PAIRS,
        warnings=[parts.sentence(warning) for warning in audit.get("warnings", [])],
        not_measured=[
            (describe(name).title, parts.sentence(why)) for name, why in audit.get("not_measured", {}).items()
        ],
        command=audit.get("command"),
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
        "cells": [_compared(row, number) for number in range(len(row.figures))],
    }


def _compared(row: "Row", number: int) -> dict[str, Any]:
    """One audit's figure, and how far it lies from the first's."""
    entry, figure, apart = describe(row.name), row.figures[number], row.differences[number]
    if figure is None:
        return {"value": ""}
    shown = {"value": entry.show(figure["value"]), "interval": entry.interval(figure["low"], figure["high"])}
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


def _card(number: int, pair: dict[str, Any], picture: Pictures) -> dict[str, Any]:
    """A pair as the template shows it."""
    generated, training = picture(pair)
    return {
        "number": number,
        "generated": embedded(generated),
        "training": embedded(training),
        "prompt": pair.get("prompt"),
        "caption": pair.get("training_caption"),
        "same": bool(pair.get("prompt")) and pair.get("prompt") == pair.get("training_caption"),
        "facts": parts.pair_facts(pair),
        "files": parts.pair_files(pair),
    }


def embedded(image: Image.Image) -> dict[str, Any]:
    """An image for the page: a data URI, its width and height, and whether it is to be enlarged pixel by pixel.

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
    # Everything in an audit is data, captions above all: whatever is put into a page is escaped.
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
    """Text of ours, escaped: what stands between backticks is set as code, and no line ends before a `%`."""
    tight = re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", str(escape(text)))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", tight))


def _template(name: str) -> Any:
    return _environment().get_template(name)
