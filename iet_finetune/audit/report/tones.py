"""How findings are told: as bad or good news, as open, or as plain facts."""

from functools import cache

from ..measures.metrics import rate

BAD, GOOD, OPEN, PLAIN = "bad", "good", "open", "plain"
# Copies that are rarer than this may be missed without calling a model clean.
RARE = 0.05


@cache
def enough_without_copy() -> int:
    """How many images without a copy among them show that copies are rarer than `RARE`."""
    return next(count for count in range(1, 10_000) if rate(0, count).high <= RARE)
