"""How far two figures lie apart, with the interval of the difference."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A second figure minus a first.

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


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference:
    """`second` minus `first`, with the interval that their own intervals give (MOVER: Zou and Donner, 2008).

    For two rates with Wilson's intervals this is method 10 of Newcombe (1998). It holds for independent figures; where
    both rest on the same images, as two audits with the same data do, they move together and it is rather too wide.

    Args:
        first, second: metrics as in audit.json: `value`, `low`, `high`. A value that lies beyond an end of its own
            interval, as a bootstrap may have it, counts as lying on that end.
    """
    value = second["value"] - first["value"]
    below = math.hypot(_arm(second["value"] - second["low"]), _arm(first["high"] - first["value"]))
    above = math.hypot(_arm(second["high"] - second["value"]), _arm(first["value"] - first["low"]))
    return Difference(value, value - below, value + above)


def _arm(length: float) -> float:
    return max(length, 0.0)
