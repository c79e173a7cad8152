"""Audits side by side: the metrics that two or more have, and how far each lies from the first audit's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .differences import Difference

COMPARISON_FORMAT, COMPARISON_VERSION = "iet_finetune.comparison", 1


@dataclass(frozen=True)
class Row:
    """One metric in every audit.

    Attributes:
        name: of the metric, as in the catalogue.
        figures: one per audit, as in audit.json; None where it was not measured.
        differences: one per audit, to the first; None for the first and where either is missing.
    """

    name: str
    figures: tuple[Mapping[str, Any] | None, ...]
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
    audits: tuple[Mapping[str, Any], ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What compare.json holds: nothing of the audits but who they are and the figures."""
        return {
            "format": COMPARISON_FORMAT,
            "version": COMPARISON_VERSION,
            "audits": [
                {"label": label, "model": audit.get("model"), "date": audit.get("date")}
                for label, audit in zip(self.labels, self.audits, strict=True)
            ],
            "metrics": {
                row.name: {
                    "figures": list(row.figures),
                    "differences": [each.to_json() if each else None for each in row.differences],
                }
                for row in self.rows
            },
            "warnings": list(self.warnings),
        }
