"""What each part of an audit returns: metrics, what it could not measure and why, warnings and histograms."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .metrics import Metric


@dataclass(frozen=True)
class ModelIdentity:
    """A model by name and by hash of its weights."""

    model: str | None = None
    fingerprint: str | None = None


# In JSON the items of such a field stand among the fields of its owner.
INLINE = {"inline": True}


@dataclass(frozen=True)
class Histogram:
    """Counts of several sets of numbers over common bins.

    Attributes:
        edges: n + 1 of them, ascending.
        series: name to n counts.
    """

    edges: list[float]
    series: dict[str, list[int]] = field(metadata=INLINE)


@dataclass(frozen=True)
class NoiseLevel:
    """The metrics of one noise level, a fraction of the schedule in (0, 1)."""

    level: float
    metrics: dict[str, Metric] = field(metadata=INLINE)


@dataclass(frozen=True)
class RepeatClass:
    """The metrics of all training images that are in the data equally often.

    Attributes:
        repeats: how often, such as `2-4`.
        images: how many distinct images these are; None if unknown.
    """

    repeats: str
    images: int | None
    metrics: dict[str, Metric] = field(metadata=INLINE)


@dataclass(frozen=True)
class Findings:
    """The results of one part of an audit, or of several merged.

    Attributes:
        metrics: by name.
        not_measured: the name of a metric that is missing to the reason, in words for the reader of the report.
        warnings: one line each.
        histograms: by name.
    """

    metrics: dict[str, Metric] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    histograms: dict[str, Histogram] = field(default_factory=dict)

    @staticmethod
    def merged(*findings: "Findings") -> "Findings":
        """All of them in one, in the given order; the same warning is kept once.

        Raises:
            ValueError: two parts measured the same metric, or one metric is both measured and not.
        """
        everything = Findings()
        for part in findings:
            _add(everything.metrics, part.metrics)
            _add(everything.not_measured, part.not_measured)
            _add(everything.histograms, part.histograms)
            everything.warnings.extend(line for line in part.warnings if line not in everything.warnings)
        if both := everything.metrics.keys() & everything.not_measured.keys():
            raise ValueError(f"both measured and not measured: {', '.join(sorted(both))}")
        return everything


def histogram(edges: Sequence[float] | np.ndarray, **series: np.ndarray | None) -> Histogram:
    """Counts several sets of numbers over common bins.

    Args:
        edges: (n + 1,), ascending. A number beyond an end is counted in the bin at that end, so that none is lost.
        series: name to numbers (any shape); None is left out.
    """
    bounds = np.asarray(edges, dtype=np.float64)
    counts = {
        name: np.histogram(np.clip(np.ravel(values), bounds[0], bounds[-1]), bounds)[0].tolist()
        for name, values in series.items()
        if values is not None
    }
    return Histogram(bounds.tolist(), counts)


def _add(into: dict, new: dict) -> None:
    """Puts the items of `new` into `into`; a name that is already there is a bug."""
    if twice := into.keys() & new.keys():
        raise ValueError(f"found twice: {', '.join(sorted(twice))}")
    into.update(new)
