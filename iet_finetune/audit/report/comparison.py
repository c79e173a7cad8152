"""Audits side by side: the metrics that two or more have, and how far each lies from the first audit's."""

import math
from dataclasses import dataclass
from typing import Any

from ..measures.metrics import Metric
from .record import AuditRecord

COMPARISON_FORMAT, COMPARISON_VERSION = "iet_finetune.comparison", 2


@dataclass(frozen=True)
class Difference:
    """A second metric minus a first.

    Attributes:
        value: the difference.
        low, high: its 95 % confidence interval.
    """

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, float | bool]:
        """The numbers, and `clear`."""
        return {"value": self.value, "low": self.low, "high": self.high, "clear": self.clear}


@dataclass(frozen=True)
class Row:
    """One metric in every audit.

    Attributes:
        name: of the metric, as in the catalogue.
        values: the metric of each audit; None where it was not measured.
        differences: one per audit, to the first; None for the first and where either is missing.
    """

    name: str
    values: tuple[Metric | None, ...]
    differences: tuple[Difference | None, ...]


@dataclass(frozen=True)
class Comparison:
    """Audits side by side.

    Attributes:
        labels: what each is called; all different.
        audits: the audits themselves.
        rows: the metrics that at least two of them have, in the order of the catalogue.
        warnings: why they may not be comparable, one line each.
    """

    labels: tuple[str, ...]
    audits: tuple[AuditRecord, ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of compare.json: of each audit its label, model, date and metrics."""
        return {
            "format": COMPARISON_FORMAT,
            "version": COMPARISON_VERSION,
            "audits": [
                {"label": label, "model": audit.model, "date": audit.date}
                for label, audit in zip(self.labels, self.audits, strict=True)
            ],
            "metrics": {
                row.name: {
                    "figures": [each.to_json() if each else None for each in row.values],
                    "differences": [each.to_json() if each else None for each in row.differences],
                }
                for row in self.rows
            },
            "warnings": list(self.warnings),
        }


def difference(first: Metric, second: Metric) -> Difference:
    """`second` minus `first`, with the interval that their own intervals give (MOVER: Zou and Donner, 2008).

    For two rates with Wilson's intervals this is method 10 of Newcombe (1998). It assumes independent metrics; two
    audits of the same data are correlated, which makes the interval too wide. A value beyond an end of its own
    interval, as a bootstrap may give, counts as lying on that end.
    """
    value = second.value - first.value
    below = math.hypot(_arm(second.value - second.low), _arm(first.high - first.value))
    above = math.hypot(_arm(second.high - second.value), _arm(first.value - first.low))
    return Difference(value, value - below, value + above)


def _arm(length: float) -> float:
    return max(length, 0.0)
