"""What each metric means: its title, a sentence about it, which way is better, how it is written.

The texts are in `metrics.yaml`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

GROUPS = ("Memorization", "Membership", "Prompts", "Quality", "Other")
# How often an image is in the data: the end of a metric's name, and the words of `by_repeats`.
REPEATS = {"x1": "1", "x2_4": "2-4", "x5_9": "5-9", "x10_up": "10 or more"}
# What is also measured by how often images are in the data.
BY_REPEATS = ("extracted", "mia_auc", "mia_ref_auc", "prompt_memorization")
# Names fit for a title; other features are called by their slug.
_SHORT = {"effnet_lite0": "EffNetLite0"}


@dataclass(frozen=True)
class Entry:
    """What is known about one metric.

    Attributes:
        name: as in audit.json, such as `frechet_effnet_lite0`.
        title: for a table or a card; plain text.
        meaning: one sentence for a reader who does not know the metric.
        group: one of `GROUPS`.
        baseline: what its baseline is, in words.
        better: `lower` or `higher`; None where neither is.
        percent: written as a percentage; otherwise as a number.
        digits: after the decimal point.
        source: the paper it is taken from; empty where there is none.
        minor: a detail of another metric, such as one more threshold.
        slug: of the features it is measured in, if any.
        repeats: it is of the images that are so often in the data (`1`, `2-4`, ...); None: of all.
    """

    name: str
    title: str
    meaning: str = ""
    group: str = "Other"
    baseline: str = "baseline"
    better: str | None = None
    percent: bool = False
    digits: int = 3
    source: str = ""
    minor: bool = False
    slug: str | None = None
    repeats: str | None = None

    def number(self, value: float) -> str:
        """A value without its unit: 0.0234 of a rate is `2.3`."""
        text = f"{100 * value if self.percent else value:,.{self.digits}f}"
        return text.removeprefix("-") if not text.strip("-0.,") else text

    def show(self, value: float) -> str:
        """A value with its unit: 0.0234 of a rate is `2.3 %`."""
        return self.number(value) + (" %" if self.percent else "")

    def interval(self, low: float, high: float) -> str:
        """The two ends of an interval, without unit: `1.5 to 3.4`."""
        return f"{self.number(low)} to {self.number(high)}"

    @property
    def is_other_cut(self) -> bool:
        """Whether it is only another threshold or percentile of a metric."""
        return self.minor and self.repeats is None

    @property
    def direction(self) -> str:
        """Which way is better, in words; empty where neither is."""
        return f"{self.better} is better" if self.better else ""


def describe(name: str) -> Entry:
    """What is known about the metric of this name.

    A name that is not known, as from a newer audit, gets an entry of the group `Other` that says no more than it.
    """
    return _known(name) or Entry(name, name)


def repeats_name(metric: str, repeats: str) -> str | None:
    """The name of a metric for images that are so often in the data (`1`, `2-4`, ...); None for other words."""
    ends = {words: end for end, words in REPEATS.items()}
    return f"{metric}_{ends[repeats]}" if repeats in ends else None


def times(repeats: str) -> str:
    """How often an image is in the data, in words: `once`, `2 to 4 times`."""
    return "once" if repeats == "1" else f"{repeats.replace('-', ' to ')} times"


def in_order(names: Iterable[str]) -> list[str]:
    """The names by group, within one in the order of the catalogue, details behind their metric."""
    return sorted(names, key=_place)


@cache
def _entries() -> dict[str, Entry]:
    """The entries of the file by their own names: `kid`, `mq`; their names in an audit have an end."""
    texts = yaml.safe_load(Path(__file__).with_name("metrics.yaml").read_text(encoding="utf-8"))
    return {name: _entry(name, **values) for name, values in texts.items()}


def _entry(name: str, in_features: bool = False, percent: bool = False, better: str = "lower", **values: Any) -> Entry:
    values = {"digits": 1 if percent else 3, "slug": "" if in_features else None, **values}
    return Entry(name, percent=percent, better=better, **values)


def _known(name: str) -> Entry | None:
    known, (start, _, end) = _entries(), name.rpartition("_")
    if name in known and known[name].slug is None and name != "mq":
        return known[name]
    if start == "mq":
        return _mq(name, end)
    for metric in BY_REPEATS:
        end = name.removeprefix(f"{metric}_")
        if end != name and end in REPEATS:
            title = f"{known[metric].title}, in the data {times(REPEATS[end])}"
            return replace(known[metric], name=name, title=title, minor=True, repeats=REPEATS[end])
    for start, entry in known.items():
        slug = name.removeprefix(f"{start}_")
        if entry.slug is not None and slug and slug != name:
            return replace(entry, name=name, title=entry.title.format(_SHORT.get(slug, slug)), slug=slug)
    return None


def _mq(name: str, threshold: str) -> Entry | None:
    if not threshold.replace(".", "", 1).isdigit():
        return None
    entry = _entries()["mq"]
    title, meaning = entry.title.format(threshold), entry.meaning.format(threshold)
    # The paper's tables have ten thresholds; one stands for them.
    return replace(entry, name=name, title=title, meaning=meaning, minor=threshold != "0.4")


def _place(name: str) -> tuple[int, int, str, int, str]:
    """Sorts by group, metric, features, and how often an image is in the data."""
    entry, known = describe(name), list(_entries())
    start, often = name.removesuffix(f"_{entry.slug}"), 0
    if entry.repeats is not None:
        often = 1 + list(REPEATS.values()).index(entry.repeats)
        start = next(metric for metric in BY_REPEATS if name.startswith(f"{metric}_x"))
    start = "mq" if start.startswith("mq_") else start
    position = known.index(start) if start in known else len(known)
    return GROUPS.index(entry.group), position, entry.slug or "", often, name
