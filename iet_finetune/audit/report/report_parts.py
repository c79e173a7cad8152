"""What the report shows, part by part: rows, charts and lines of text."""

import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from markupsafe import Markup

from ..measures.findings import Histogram, NoiseLevel
from ..measures.metrics import Metric
from .catalogue import BY_REPEATS, GROUPS, describe, in_order, times
from .charts import histogram_chart, interval_mark, level_chart
from .record import AuditRecord, ClosestPair

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
# Drawn on a linear scale; in the others copies are few, which a square root makes visible.
_EVEN = ("mia", "mia_ref", "prompt")
_SERIES = {
    "generated": "generated images",
    "baseline": "held-out images",
    "training": "training images",
    "heldout": "held-out images",
}
_DATA = {
    "generated_images": ("generated image", "generated images"),
    "distinct": ("distinct training image", "distinct training images"),
    "heldout_images": ("held-out image", "held-out images"),
}


def facts(audit: AuditRecord) -> list[str]:
    """The line below the title: kind of pipeline, date, how many images."""
    counts = {words: getattr(audit.data, name) for name, words in _DATA.items()}
    shown = [f"{count:,} {words[count != 1]}" for words, count in counts.items() if count is not None]
    return [*filter(None, [audit.pipeline_class, _day(audit.date)]), *shown]


def tiles(audit: AuditRecord) -> list[Part]:
    """The most important metrics, four at most."""
    metrics = audit.metrics
    frechet = tuple(name for name in in_order(metrics) if name.startswith("frechet_"))
    found = [next((name for name in names if name in metrics), None) for names in (*_TILES, frechet, _PROMPTS)]
    return [_row(name, metrics[name], short=True) for name in found if name is not None][:4]


def groups(audit: AuditRecord) -> list[Part]:
    """The metrics by group; `minor` are those that are only other thresholds of one shown before."""
    # Metrics of the table by repeats are not shown twice.
    names = [name for name in in_order(audit.metrics) if not (describe(name).repeats and audit.by_repeats)]
    return by_group([_row(name, audit.metrics[name]) for name in names])


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


def _row(name: str, metric: Metric, short: bool = False) -> Part:
    entry = describe(name)
    interval = entry.interval(metric.low, metric.high)
    return {
        "group": entry.group,
        "minor": entry.is_other_cut,
        "title": entry.title,
        "meaning": entry.meaning,
        "remark": f"{entry.direction[:1].upper()}{entry.direction[1:]}." if entry.better else "",
        "value": entry.show(metric.value),
        "count": _count(metric),
        "interval": f"95 %: {interval}" if short else interval,
        "baseline": None if metric.baseline is None else entry.show(metric.baseline),
        "baseline_words": entry.baseline,
        "mark": _mark(metric, entry.percent),
    }


def _count(metric: Metric) -> str:
    return f"{metric.count:,} of {metric.total:,}" if metric.total else ""


def _mark(metric: Metric, percent: bool) -> Markup:
    """A rate starts at 0; other metrics are centred on their line, together with the baseline."""
    points = [each for each in (metric.value, metric.low, metric.high, metric.baseline) if each is not None]
    low, high = min(points), max(points)
    reach = (high - low) * 0.15 or abs(high) * 0.15 or 1.0
    start, end = (0.0, high * 1.1 or 1.0) if percent else (low - reach, high + reach)
    return interval_mark(metric, start, end)


def repeats(audit: AuditRecord) -> Part | None:
    """Metrics of the images that are in the data once, a few times, often; None if there are none."""
    rows = audit.by_repeats
    columns = [name for name in BY_REPEATS if any(name in row.metrics for row in rows)]
    if not rows:
        return None
    return {
        "columns": [describe(name).title for name in columns],
        "rows": [
            {
                "words": times(row.repeats),
                "images": "" if row.images is None else f"{row.images:,}",
                "cells": [_cell(name, row.metrics.get(name)) for name in columns],
            }
            for row in rows
        ],
    }


def _cell(name: str, metric: Metric | None) -> Part:
    entry = describe(name)
    if metric is None:
        return {"column": entry.title, "value": ""}
    return {
        "column": entry.title,
        "value": entry.show(metric.value),
        "count": _count(metric),
        "interval": entry.interval(metric.low, metric.high),
    }


def charts(audit: AuditRecord) -> list[Part]:
    """All histograms, and the membership metrics by noise level."""
    return [*(_histogram(name, each) for name, each in audit.histograms.items()), *_levels(audit.by_noise_level)]


def _histogram(name: str, content: Histogram) -> Part:
    title, axis, words, threshold = _HISTOGRAMS.get(name) or _similarity(name)
    names = (
        {**_SERIES, "training": "training captions", "heldout": "held-out captions"} if name == "prompt" else _SERIES
    )
    series = [(names.get(key, key), counts) for key, counts in content.series.items()]
    return {
        "title": title,
        "axis": axis,
        "words": f"Share of {'captions' if name == 'prompt' else 'images'} in each bin. {words}".strip(),
        "series": [each for each, _ in series],
        "svg": histogram_chart(title, content.edges, series, axis, threshold, root=name not in _EVEN),
    }


def _similarity(name: str) -> tuple[str, str, str, tuple[float, str] | None]:
    if not name.startswith("similarity_"):
        return name, name, "", None
    slug = name.removeprefix("similarity_")
    title = describe(f"similarity_above_0.5_{slug}").title.replace(" above 0.5", " to the most similar training image")
    return title, "cosine similarity", "Copies lie at the right. Square-root scale.", None


def _levels(rows: Sequence[NoiseLevel]) -> Iterator[Part]:
    names = [name for name in ("mia_auc", "mia_ref_auc") if any(name in row.metrics for row in rows)]
    if not names:
        return
    title = "Membership by noise level"
    series = [(describe(name).title, [row.metrics.get(name) for row in rows]) for name in names]
    yield {
        "title": title,
        "axis": "noise level (share of the schedule)",
        "words": "AUC with its 95 % interval, from little noise to much.",
        "series": [each for each, _ in series],
        "svg": level_chart(title, [row.level for row in rows], series),
    }


def pair_facts(pair: ClosestPair) -> list[tuple[str, str]]:
    """Facts about a pair without the names of its files: label and value."""
    lines: list[tuple[str, str | None]] = [
        ("ratio", _number(pair.ratio, 3)),
        ("rms distance", _number(pair.distance, 4)),
        *((f"similarity ({slug})", _number(value, 3)) for slug, value in pair.similarity.items()),
        ("mirrored", "yes" if pair.flipped else None),
        ("in the data", times(str(pair.repeats))),
        ("in training", _seen(pair)),
    ]
    return [(words, value) for words, value in lines if value is not None]


def pair_files(pair: ClosestPair) -> list[tuple[str, str]]:
    """The files of a pair, which may name local folders: label and name."""
    return [("training file", pair.training_name), ("generated file", pair.generated)]


def _seen(pair: ClosestPair) -> str | None:
    if pair.seen is None:
        return None
    return f"seen {times(f'{pair.seen:,}')}" + (
        f", skipped {times(f'{pair.skipped:,}')}" if pair.skipped is not None else ""
    )


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def conditions(audit: AuditRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings, versions, and the fingerprints of data and features."""
    data = {name.replace("_", " "): value for name, value in asdict(audit.data).items() if value is not None}
    prints = [(name, value) for name, value in data.items() if isinstance(value, str)]
    prints += [(f"features {each.slug}", each.fingerprint) for each in audit.features if each.fingerprint]
    everything = {
        "Data": [(name, f"{value:,}") for name, value in data.items() if isinstance(value, int)],
        "Settings": [(f"--{name.lstrip('-')}", _plain(value)) for name, value in audit.settings.items()],
        "Versions": list(audit.versions.items()),
        "Fingerprints": prints,
    }
    return [(title, rows) for title, rows in everything.items() if rows]


def sources(audit: AuditRecord) -> list[tuple[str, str]]:
    """The papers behind the metrics, each with the titles of its metrics."""
    papers: dict[str, list[str]] = {}
    for name in in_order(audit.metrics):
        entry = describe(name)
        if entry.source and not entry.minor:
            papers.setdefault(entry.source, []).append(entry.title)
    return [(source, ", ".join(titles)) for source, titles in papers.items()]


def sentence(text: str) -> str:
    """A line as a sentence: with a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _plain(value: Any) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _day(date: str | None) -> str | None:
    """`25 November 2026`; other text stays as it is."""
    try:
        day = datetime.date.fromisoformat(date or "")
    except ValueError:
        return date
    return f"{day.day} {day:%B %Y}"
