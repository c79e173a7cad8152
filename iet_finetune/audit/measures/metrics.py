"""A metric: a value with its 95 % confidence interval and its baseline; rates and bootstraps."""

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
    """A measured value.

    Attributes:
        value: the value itself.
        low, high: its 95 % confidence interval.
        baseline: the same metric of real images that were not trained on, or what chance gives; None if there is none.
        count, total: of a rate, how many of how many.
        baseline_low, baseline_high: the 95 % confidence interval of the baseline, where it has one of its own.
    """

    value: float
    low: float
    high: float
    baseline: float | None = None
    count: int | None = None
    total: int | None = None
    baseline_low: float | None = None
    baseline_high: float | None = None

    def __post_init__(self) -> None:
        numbers = [each for each in asdict(self).values() if each is not None]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"a metric must be finite, not {numbers}")

    def against(self, baseline: "Metric | float | None") -> "Metric":
        """The same metric with its baseline, and the interval of that if it has one."""
        if isinstance(baseline, Metric):
            return replace(self, baseline=baseline.value, baseline_low=baseline.low, baseline_high=baseline.high)
        return replace(self, baseline=baseline)

    @property
    def of_baseline(self) -> "Metric | None":
        """The baseline as a metric; one without an interval of its own counts as exact."""
        if self.baseline is None:
            return None
        low, high = (self.baseline if end is None else end for end in (self.baseline_low, self.baseline_high))
        return Metric(self.baseline, low, high)

    def to_json(self) -> dict[str, Any]:
        """`value`, `low`, `high` and `baseline`, and of the others what there is."""
        always = ("value", "low", "high", "baseline")
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
