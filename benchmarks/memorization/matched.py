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
        NaN if it never comes there; the first value if it begins there or better.
    """
    reached = np.flatnonzero(quality <= wanted)
    if len(reached) == 0:
        return float("nan")
    after = int(reached[0])
    if after == 0:
        return float(values[0])
    before = after - 1
    share = (quality[before] - wanted) / (quality[before] - quality[after])
    return float(values[before] + share * (values[after] - values[before]))


def redrawn(run: Trajectory, rng: np.random.Generator) -> np.ndarray:
    """(n,) the shares among images drawn anew from those of each point: binomial, as each image counts or does not."""
    return rng.binomial(run.total, run.count / run.total) / run.total


def difference(
    ours: Sequence[Trajectory], theirs: Sequence[Trajectory], wanted: float, baseline: float, seed: int = 0
) -> tuple[Interval, Interval, Interval] | None:
    """Two arms at one quality: shares above the baseline of each, and by which part ours is lower than theirs.

    Seeds are drawn anew as pairs, as both arms have the same data, then images within each run. Qualities are taken
    as measured.

    Args:
        ours, theirs: runs with the same seeds, in the same order.
        baseline: the share among real images, which no training can be blamed for.

    Returns:
        our excess, theirs, and 1 - ours / theirs; None if a run does not come to the quality.
    """
    pairs = list(zip(ours, theirs, strict=True))

    def excess(
        runs: Sequence[tuple[Trajectory, Trajectory]], values: Callable[[Trajectory], np.ndarray]
    ) -> np.ndarray:
        both = [[at_quality(run.quality, values(run), wanted) for run in pair] for pair in runs]
        return np.mean(both, axis=0) - baseline

    rng = np.random.default_rng(seed)
    value = excess(pairs, lambda run: run.count / run.total)
    if not np.isfinite(value).all():
        return None
    drawn = np.array(
        [
            excess([pairs[i] for i in rng.integers(0, len(pairs), len(pairs))], lambda run: redrawn(run, rng))
            for _ in range(RESAMPLES)
        ]
    )
    everything = [*zip(value, drawn.T, strict=True), (_part(*value), np.array([_part(*each) for each in drawn]))]
    one, other, part = (_interval(number, numbers) for number, numbers in everything)
    return one, other, part


def fewer(
    ours: Sequence[tuple[int, int]], theirs: Sequence[tuple[int, int]], baseline: float = 0.0, seed: int = 0
) -> Interval:
    """By which part ours is lower than theirs, above the baseline, without regard to quality.

    Args:
        ours, theirs: of each seed how many of how many images.
    """
    rng = np.random.default_rng(seed)

    def part(pairs: list[tuple[tuple[int, int], tuple[int, int]]], draw: bool) -> float:
        both = np.array(
            [
                [(rng.binomial(total, count / total) if draw else count) / total for count, total in pair]
                for pair in pairs
            ]
        )
        return _part(*(both.mean(axis=0) - baseline))

    pairs = list(zip(ours, theirs, strict=True))
    drawn = [part([pairs[i] for i in rng.integers(0, len(pairs), len(pairs))], True) for _ in range(RESAMPLES)]
    return _interval(part(pairs, False), np.array(drawn))


def _part(ours: float, theirs: float) -> float:
    """1 - ours / theirs; 0 where theirs has nothing to lose."""
    return float(1 - ours / theirs) if theirs > 0 else 0.0


def _interval(value: float, drawn: np.ndarray) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))
