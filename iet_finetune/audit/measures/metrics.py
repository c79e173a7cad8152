"""What every figure of an audit is: a value with its 95 % confidence interval and what held-out images score."""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

CONFIDENCE = 0.95
# 1.96: so many standard deviations to either side of a normal distribution's mean hold that share of it.
_REACH = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
RESAMPLES = 1000


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        value: the figure itself.
        low, high: its 95 % confidence interval.
        null: the same figure with real images that were not trained on in the place of what is judged, or what chance
            gives; None where there is no such thing.
        count, total: of a rate, how many of how many.
        null_low, null_high: the 95 % confidence interval of the null, where it has one of its own.
    """

    value: float
    low: float
    high: float
    null: float | None = None
    count: int | None = None
    total: int | None = None
    null_low: float | None = None
    null_high: float | None = None

    def __post_init__(self) -> None:
        numbers = [each for each in asdict(self).values() if each is not None]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"a metric must be finite, not {numbers}")

    def against(self, null: "Metric | float | None") -> "Metric":
        """The same figure beside its null, and the interval of that if it has one."""
        if isinstance(null, Metric):
            return replace(self, null=null.value, null_low=null.low, null_high=null.high)
        return replace(self, null=null)

    def to_json(self) -> dict[str, Any]:
        """`value`, `low`, `high` and `null`, and of the others what there is."""
        always = ("value", "low", "high", "null")
        return {name: value for name, value in asdict(self).items() if name in always or value is not None}


def rate(count: int, total: int) -> Metric:
    """A share, with Wilson's score interval (Wilson, 1927).

    Raises:
        ValueError: there are none, or more than there are.
    """
    if not 0 <= count <= total or total == 0:
        raise ValueError(f"{count} of {total} is no rate")
    share, weight = count / total, _REACH**2 / total
    middle = (share + weight / 2) / (1 + weight)
    reach = _REACH / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    # Rounding must not leave an end beyond where it lies.
    low, high = (0.0 if count == 0 else middle - reach), (1.0 if count == total else middle + reach)
    return Metric(share, low, high, count=count, total=total)


def bootstrap(
    statistic: Callable[..., float],
    *samples: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    centred: bool = False,
) -> Metric:
    """`statistic(*samples)`, with the percentile interval of its bootstrap distribution (Efron, 1979).

    Args:
        statistic: of arrays like `samples`.
        samples: each is drawn from anew, independently of the others, along its first dimension.
        resamples: how often.
        seed: of the draws.
        centred: the interval is the value plus and minus 1.96 standard deviations of the bootstrap distribution, for
            statistics that repeated samples push to one side, such as a Fréchet distance.
    """
    value = float(statistic(*samples))
    rng = np.random.default_rng(seed)
    drawn = np.array(
        [
            float(statistic(*(sample[rng.integers(0, len(sample), len(sample))] for sample in samples)))
            for _ in range(resamples)
        ]
    )
    if centred:
        reach = _REACH * float(drawn.std(ddof=1))
        return Metric(value, value - reach, value + reach)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Metric(value, float(low), float(high))


def mean(values: np.ndarray, seed: int = 0) -> Metric:
    """The mean of numbers (n,), with its bootstrap interval."""
    return bootstrap(np.mean, values, seed=seed)
