"""What the report shows, part by part: rows, charts and lines of text, made from the content of an audit.json."""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .catalogue import BY_REPEATS, GROUPS, describe, in_order, times
from .charts import histogram_chart, interval_mark, level_chart

Audit = Mapping[str, Any]
Part = dict[str, Any]

# In this order, the first that there is of each line.
_TILES = (("f_mem",), ("extracted",), ("mia_ref_auc", "mia_auc"))
_PROMPTS = ("prompt_memorization_auc",)
# Of histograms: title, axis, what a low or high value means, the line in it and what it is called.
_HISTOGRAMS: dict[str, tuple[str, str, str, tuple[float, str] | None]] = {
    "ratio": (
        "How near the nearest training image is",
        "distance to the nearest over distance to the second nearest",
        "Copies lie at the left: near one training image, far from all others. Square-root scale.",
        (1 / 3, "copies below 1/3"),
    ),
    "mq_ratio": (
        "Against the 50 nearest training images",
        "squared distance to the nearest over the mean of the 50 smallest",
        "Copies lie at the left. Square-root scale.",
        None,
    ),
    "mia": (
        "Membership score, loss alone",
        "score: minus the logarithm of the loss",
        "The less the two overlap, the better training images can be told.",
        None,
    ),
    "mia_ref": (
        "Membership score against the reference model",
        "score: logarithm of the reference's loss over the model's",
        "The less the two overlap, the better training images can be told.",
        None,
    ),
    "prompt": (
        "Pull of the captions",
        "size of what the caption adds to the predicted noise",
        "Memorized captions lie at the right.",
        None,
    ),
}
# Drawn on an even scale; in the others copies are few and far from the rest, which a square root brings out.
_EVEN = ("mia", "mia_ref", "prompt")
_SERIES = {
    "generated": "generated images",
    "null": "held-out images",
    "training": "training images",
    "heldout": "held-out images",
}
_DATA = {
    "generated_images": ("generated image", "generated images"),
    "distinct": ("distinct training image", "distinct training images"),
    "heldout_images": ("held-out image", "held-out images"),
}


def facts(audit: Audit) -> list[str]:
    """The line below the title: kind of pipeline, date, how many images."""
    data = audit.get("data", {})
    counts = [f"{data[name]:,} {words[data[name] != 1]}" for name, words in _DATA.items() if name in data]
    return [*filter(None, [audit.get("pipeline_class"), _day(audit.get("date"))]), *counts]


def tiles(audit: Audit) -> list[Part]:
    """The most important figures, four at most."""
    metrics = audit.get("metrics", {})
    frechet = tuple(name for name in in_order(metrics) if name.startswith("frechet_"))
    found = [next((name for name in names if name in metrics), None) for names in (*_TILES, frechet, _PROMPTS)]
    return [_row(name, metrics[name], short=True) for name in found if name is not None][:4]


def groups(audit: Audit) -> list[Part]:
    """The metrics by group; `minor` are those that are only other thresholds of one shown before."""
    metrics = audit.get("metrics", {})
    # What is in the table by repeats is not shown twice.
    names = [name for name in in_order(metrics) if not (describe(name).repeats and audit.get("by_repeats"))]
    return by_group([_row(name, metrics[name]) for name in names])


def by_group(rows: Sequence[Part]) -> list[Part]:
    """Rows with `group` and `minor`, sorted into the groups of the catalogue; groups without rows are left out."""
    return [
        {
            "name": name,
            "rows": [row for row in each if not row["minor"]],
            "minor": [row for row in each if row["minor"]],
        }
        for name in GROUPS
        if (each := [row for row in rows if row["group"] == name])
    ]


def _row(name: str, figure: Mapping[str, Any], short: bool = False) -> Part:
    entry = describe(name)
    interval = entry.interval(figure["low"], figure["high"])
    null = figure.get("null")
    return {
        "group": entry.group,
        "minor": entry.is_other_cut,
        "title": entry.title,
        "meaning": entry.meaning,
        "remark": f"{entry.direction[:1].upper()}{entry.direction[1:]}." if entry.better else "",
        "value": entry.show(figure["value"]),
        "count": _count(figure),
        "interval": f"95 %: {interval}" if short else interval,
        "null": None if null is None else entry.show(null),
        "null_words": entry.null,
        "mark": _mark(figure, entry.percent),
    }


def _count(figure: Mapping[str, Any]) -> str:
    return f"{figure['count']:,} of {figure['total']:,}" if figure.get("total") else ""


def _mark(figure: Mapping[str, Any], percent: bool) -> Markup:
    """A rate starts at 0; other figures lie in the middle of their line, together with the null."""
    null = figure.get("null")
    points = [figure["value"], figure["low"], figure["high"], *([] if null is None else [null])]
    low, high = min(points), max(points)
    reach = (high - low) * 0.15 or abs(high) * 0.15 or 1.0
    start, end = (0.0, high * 1.1 or 1.0) if percent else (low - reach, high + reach)
    return interval_mark(figure["value"], figure["low"], figure["high"], null, start, end)


def repeats(audit: Audit) -> Part | None:
    """Figures of the images that are in the data once, a few times, often; None if there are none."""
    rows = audit.get("by_repeats") or []
    columns = [name for name in BY_REPEATS if any(row.get(name) for row in rows)]
    if not rows:
        return None
    return {
        "columns": [describe(name).title for name in columns],
        "rows": [
            {
                "words": times(row["repeats"]),
                "images": f"{row['images']:,}" if "images" in row else "",
                "cells": [_cell(name, row.get(name)) for name in columns],
            }
            for row in rows
        ],
    }


def _cell(name: str, figure: Mapping[str, Any] | None) -> Part:
    entry = describe(name)
    if figure is None:
        return {"column": entry.title, "value": ""}
    return {
        "column": entry.title,
        "value": entry.show(figure["value"]),
        "count": _count(figure),
        "interval": entry.interval(figure["low"], figure["high"]),
    }


def charts(audit: Audit) -> list[Part]:
    """All histograms, and the membership figures by noise level."""
    drawn = [_histogram(name, each) for name, each in audit.get("histograms", {}).items()]
    return [*drawn, *_levels(audit.get("by_noise_level") or [])]


def _histogram(name: str, content: Mapping[str, Any]) -> Part:
    title, axis, words, threshold = _HISTOGRAMS.get(name) or _similarity(name)
    names = (
        {**_SERIES, "training": "training captions", "heldout": "held-out captions"} if name == "prompt" else _SERIES
    )
    series = [(names.get(key, key), counts) for key, counts in content.items() if key != "edges"]
    return {
        "title": title,
        "axis": axis,
        "words": f"Share of {'captions' if name == 'prompt' else 'images'} in each bin. {words}".strip(),
        "series": [each for each, _ in series],
        "svg": histogram_chart(title, content["edges"], series, axis, threshold, root=name not in _EVEN),
    }


def _similarity(name: str) -> tuple[str, str, str, tuple[float, str] | None]:
    if not name.startswith("similarity_"):
        return name, name, "", None
    slug = name.removeprefix("similarity_")
    title = describe(f"similarity_above_0.5_{slug}").title.replace(" above 0.5", " to the most similar training image")
    return title, "cosine similarity", "Copies lie at the right. Square-root scale.", None


def _levels(rows: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    names = [name for name in ("mia_auc", "mia_ref_auc") if any(row.get(name) for row in rows)]
    if not names:
        return
    title = "Membership by noise level"
    series = [(describe(name).title, [_point(row[name]) if row.get(name) else None for row in rows]) for name in names]
    yield {
        "title": title,
        "axis": "noise level (share of the schedule)",
        "words": "AUC with its 95 % interval, from little noise to much.",
        "series": [each for each, _ in series],
        "svg": level_chart(title, [row["level"] for row in rows], series),
    }


def _point(figure: Mapping[str, Any]) -> tuple[float, float, float]:
    return figure["value"], figure["low"], figure["high"]


def pair_facts(pair: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known about a pair, but for the names of its files: words and value."""
    lines: list[tuple[str, str | None]] = [
        ("ratio", _number(pair.get("ratio"), 3)),
        ("rms distance", _number(pair.get("distance"), 4)),
        *((f"similarity ({slug})", _number(value, 3)) for slug, value in (pair.get("similarity") or {}).items()),
        ("mirrored", "yes" if pair.get("flipped") else None),
        ("in the data", times(str(pair["repeats"])) if pair.get("repeats") else None),
        ("in training", _seen(pair)),
    ]
    return [(words, value) for words, value in lines if value is not None]


def pair_files(pair: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The names of a pair's files, which may tell of folders: words and name."""
    names = {"training file": pair.get("training_name"), "generated file": pair.get("generated")}
    return [(words, str(name)) for words, name in names.items() if name is not None]


def _seen(pair: Mapping[str, Any]) -> str | None:
    seen, skipped = pair.get("seen"), pair.get("skipped")
    if seen is None:
        return None
    return f"seen {times(f'{seen:,}')}" + (f", skipped {times(f'{skipped:,}')}" if skipped is not None else "")


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def conditions(audit: Audit) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings, versions, and the fingerprints of data and features."""
    data = audit.get("data", {})
    prints = [(name.replace("_", " "), value) for name, value in data.items() if name.endswith("fingerprint")]
    prints += [(f"features {each['slug']}", each.get("fingerprint")) for each in audit.get("features", [])]
    settings = [(f"--{name.lstrip('-')}", _plain(value)) for name, value in audit.get("settings", {}).items()]
    versions = [(name, str(value)) for name, value in audit.get("versions", {}).items()]
    numbers = [(name.replace("_", " "), f"{value:,}") for name, value in data.items() if isinstance(value, int)]
    everything = {
        "Data": numbers,
        "Settings": settings,
        "Versions": versions,
        "Fingerprints": [(name, str(value)) for name, value in prints if value],
    }
    return [(title, rows) for title, rows in everything.items() if rows]


def sources(audit: Audit) -> list[tuple[str, str]]:
    """The papers that the metrics are from, each with the titles of those."""
    papers: dict[str, list[str]] = {}
    for name in in_order(audit.get("metrics", {})):
        entry = describe(name)
        if entry.source and not entry.minor:
            papers.setdefault(entry.source, []).append(entry.title)
    return [(source, ", ".join(titles)) for source, titles in papers.items()]


def sentence(text: str) -> str:
    """A line as a sentence: a capital at its start, a point at its end."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _plain(value: Any) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _day(date: Any) -> str | None:
    """`25 November 2026`; what is no date is shown as it is."""
    try:
        day = datetime.date.fromisoformat(str(date))
    except ValueError:
        return str(date) if date else None
    return f"{day.day} {day:%B %Y}"
