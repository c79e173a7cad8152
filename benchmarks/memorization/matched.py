"""Memorization at matched quality: where a model's course through quality and memorization passes a given quality."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE, RESAMPLES = 0.95, 1000


@dataclass(frozen=True)
class Trajectory:
    """One run, judged at n points.

    Attributes:
        quality: (n,) lower is better.
        count, total: (n,) how many of how many images show what is measured.
    """

    quality: np.ndarray
    count: np.ndarray
    total: np.ndarray

    @property
    def best(self) -> float:
        """The best quality it comes to."""
        return float(self.quality.min())


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def at_quality(quality: np.ndarray, values: np.ndarray, wanted: float) -> float:
    """The value where a course first comes to a quality, between two points on the straight line that joins them.

    Args:
        quality: (n,) in the order of training, lower is better.
        values: (n,) of what is measured.

    Returns:
        NaN if it never comes there, or begins better.
    """
    reached = np.flatnonzero(quality <= wanted)
    if len(reached) == 0:
        return float("nan")
    after = int(reached[0])
    if after == 0:
        return float(values[0]) if quality[0] == wanted else float("nan")
    before = after - 1
    share = (quality[before] - wanted) / (quality[before] - quality[after])
    return float(values[before] + share * (values[after] - values[before]))


def redrawn(count: np.ndarray, total: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) the shares that may lie behind counts: drawn from Jeffreys' posterior, Beta(k + 1/2, n - k + 1/2).

    Drawing images anew would make nothing of nothing: 0 of 400 is no proof that there are none.
    """
    return rng.beta(count + 0.5, total - count + 0.5)


def difference(
    ours: Sequence[Trajectory], theirs: Sequence[Trajectory], wanted: Sequence[float], baseline: float, seed: int = 0
) -> tuple[Interval, Interval, Interval] | None:
    """Two arms at the same quality: shares above the baseline of each, and by which part ours is lower than theirs.

    Seeds are drawn anew as pairs, as both arms have the same data, then images within each run. Qualities are taken
    as measured.

    Args:
        ours, theirs: runs with the same seeds, in the same order.
        wanted: the quality, of each pair of runs.
        baseline: the share among real images, which no training can be blamed for.

    Returns:
        our excess, theirs, and 1 - ours / theirs; None if a run does not pass the quality.
    """
    pairs = list(zip(ours, theirs, wanted, strict=True))

    def excess(
        runs: Sequence[tuple[Trajectory, Trajectory, float]], values: Callable[[Trajectory], np.ndarray]
    ) -> np.ndarray:
        both = [[at_quality(run.quality, values(run), at) for run in pair] for *pair, at in runs]
        return np.mean(both, axis=0) - baseline

    rng = np.random.default_rng(seed)
    value = excess(pairs, lambda run: run.count / run.total)
    if not np.isfinite(value).all():
        return None
    drawn = np.array(
        [
            excess(
                [pairs[i] for i in rng.integers(0, len(pairs), len(pairs))],
                lambda run: redrawn(run.count, run.total, rng),
            )
            for _ in range(RESAMPLES)
        ]
    )
    everything = [*zip(value, drawn.T, strict=True), (_part(*value), np.array([_part(*each) for each in drawn]))]
    one, other, part = (_interval(number, numbers) for number, numbers in everything)
    return one, other, part


def fewer(ours: Sequence[tuple[int, int]], theirs: Sequence[tuple[int, int]], seed: int = 0) -> Interval:
    """By which part ours is lower than theirs, without regard to quality; NaN where theirs is nothing.

    Args:
        ours, theirs: of each seed how many of how many images.
    """
    rng = np.random.default_rng(seed)
    pairs = np.array([ours, theirs], dtype=float)  # (2, seeds, count and total)
    drawn = []
    for _ in range(RESAMPLES):
        some = pairs[:, rng.integers(0, pairs.shape[1], pairs.shape[1])]
        drawn.append(_part(*redrawn(some[..., 0], some[..., 1], rng).mean(axis=1)))
    return _interval(_part(*(pairs[..., 0] / pairs[..., 1]).mean(axis=1)), np.array(drawn))


def _part(ours: float, theirs: float) -> float:
    """1 - ours / theirs, 1 where ours is below chance; NaN where theirs has nothing to lose."""
    return float(1 - max(ours, 0.0) / theirs) if theirs > 0 else float("nan")


def _interval(value: float, drawn: np.ndarray) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    if not np.isfinite(drawn).any():
        return Interval(float(value), float("nan"), float("nan"))
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))
