"""Metrics of memorization from the distances to the nearest training images, in pixels and in features."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from .findings import Findings, histogram
from .metrics import Metric, bootstrap, mean, rate
from .neighbours import Neighbours

# An image counts as memorized when its nearest training image is this much nearer than the second: Yoon et al.,
# "Diffusion Probabilistic Models Generalize when They Fail to Memorize" (2023).
MEMORIZED = 1 / 3
# Of MQ, "memorization quotient": the authors of IET-AGC compare with the 50 nearest training images.
MQ_NEIGHBOURS = 50
DELTAS = tuple(delta / 100 for delta in range(15, 61, 5))
# With fewer training images the 50 nearest are a good part of all of them, and hardly near.
FEW_FOR_MQ = 500
COPIED = 0.5
# How often an image is in the training data: name of the class, from, to.
REPEATS = (("1", 1, 1), ("2-4", 2, 4), ("5-9", 5, 9), ("10 or more", 10, math.inf))
BINS = np.linspace(0, 1, 51)


def ratios(neighbours: Neighbours) -> np.ndarray:
    """Distance to the nearest reference over that to the second nearest, not squared: (G,) float64 in [0, 1].

    A generated image that equals a reference scores 0, even where two references equal it; that takes duplicates among
    the references, which `find_duplicates` removes.

    Raises:
        ValueError: fewer than two neighbours an image.
    """
    if neighbours.distance.shape[1] < 2:
        raise ValueError("the ratio needs two neighbours an image")
    return np.sqrt(_quotient(neighbours.distance[:, 0], neighbours.distance[:, 1]))


def mq_ratios(neighbours: Neighbours) -> np.ndarray:
    """Squared distance to the nearest reference over the mean of the 50 smallest: (G,) float64 in [0, 1].

    As in the code of the authors of IET-AGC; 0 where a reference equals the image.

    Raises:
        ValueError: fewer than 50 neighbours an image.
    """
    if neighbours.distance.shape[1] < MQ_NEIGHBOURS:
        raise ValueError(f"MQ needs {MQ_NEIGHBOURS} neighbours an image")
    return _quotient(neighbours.distance[:, 0], neighbours.distance[:, :MQ_NEIGHBOURS].mean(axis=1))


def pixel_metrics(generated: Neighbours, baseline: Neighbours | None, references: int) -> Findings:
    """`f_mem`, the share of images with a ratio below 1/3, and `mq_0.15` to `mq_0.6`, the share with an MQ below that.

    Args:
        generated: the nearest references of the generated images, one image at least, 50 references each, or all of
            them where there are fewer.
        baseline: those of the held-out images, or None.
        references: how many there are.

    Returns:
        the metrics with their baselines, and the histograms `ratio` and `mq_ratio`.
    """
    return Findings.merged(_f_mem(generated, baseline, references), _mq(generated, baseline, references))


def similarity_metrics(slug: str, generated: np.ndarray, baseline: np.ndarray | None, seed: int = 0) -> Findings:
    """Mean, 90th and 95th percentile, and share above 0.5 of the similarity to the most similar training image.

    Args:
        slug: of the features.
        generated: (G,) cosine similarity of each generated image to the reference most similar to it, G at least 1.
        baseline: (M,) of the held-out images, or None.
        seed: of the bootstrap.

    Returns:
        `similarity_mean_SLUG`, `similarity_p90_SLUG`, `similarity_p95_SLUG`, `similarity_above_0.5_SLUG`; the
        histogram `similarity_SLUG`, from 0 to 1.
    """

    def beside(metric: Callable[[np.ndarray], Metric]) -> Metric:
        return metric(generated).against(None if baseline is None else metric(baseline))

    metrics = {
        f"similarity_mean_{slug}": beside(lambda values: mean(values, seed)),
        f"similarity_p90_{slug}": beside(lambda values: bootstrap(_p90, values, seed=seed)),
        f"similarity_p95_{slug}": beside(lambda values: bootstrap(_p95, values, seed=seed)),
        f"similarity_above_{COPIED:g}_{slug}": beside(lambda values: _share(values > COPIED)),
    }
    return Findings(
        metrics=metrics, histograms={f"similarity_{slug}": histogram(BINS, generated=generated, baseline=baseline)}
    )


def repeat_classes(repeats: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The classes of REPEATS that have images: the label, and which images are in it (N,) bool.

    Args:
        repeats: (N,) how many training images each stands for.
    """
    for label, low, high in REPEATS:
        inside = (repeats >= low) & (repeats <= high)
        if inside.any():
            yield label, inside


def extraction(
    neighbours: Neighbours, repeats: np.ndarray, baseline: Neighbours | None
) -> tuple[Findings, dict[str, Metric]]:
    """Which references the generated images reproduce.

    A reference is extracted when it is the nearest one of a generated image whose ratio is below 1/3.

    Args:
        neighbours: the nearest references of the generated images.
        repeats: (N,) int64, how many training images each reference stands for.
        baseline: the nearest references of the held-out images, or None.

    Returns:
        `extracted`, the share of all references, and `extracted_x1`, `extracted_x2_4`, `extracted_x5_9`,
        `extracted_x10_up`, the share of those that are in the data so many times; the latter also by the label of
        their class in REPEATS. Classes without images are left out.
    """
    if len(repeats) < 2:
        return Findings(not_measured={"extracted": _too_few(2, len(repeats))}), {}
    found = _extracted(neighbours, len(repeats))
    chance = None if baseline is None else _extracted(baseline, len(repeats))
    classes = {
        label: _share(found[inside]).against(None if chance is None else float(chance[inside].mean()))
        for label, inside in repeat_classes(repeats)
    }
    everything = _share(found).against(None if chance is None else float(chance.mean()))
    metrics = {"extracted": everything} | {f"extracted_{_suffix(label)}": each for label, each in classes.items()}
    return Findings(metrics, warnings=_unequal(neighbours, baseline)), classes


def closest_pairs(neighbours: Neighbours, count: int = 50, per_reference: int = 3) -> np.ndarray:
    """The generated images nearest to being copies: up to (count,) int64, by ascending ratio, then distance.

    Where there is only one reference the distance alone decides.

    Args:
        neighbours: the nearest references of the generated images.
        count: how many, at most.
        per_reference: how many images with the same nearest reference, at most; so that one image that is copied often
            does not fill the list.
    """
    distance = neighbours.distance[:, 0]
    ratio = ratios(neighbours) if neighbours.distance.shape[1] > 1 else np.zeros(len(distance))
    order = np.lexsort((distance, ratio))
    nearest = neighbours.index[order, 0]
    by_reference = np.argsort(nearest, kind="stable")
    _, starts, sizes = np.unique(nearest[by_reference], return_index=True, return_counts=True)
    place = np.empty(len(order), dtype=np.int64)
    place[by_reference] = np.arange(len(order)) - np.repeat(starts, sizes)
    return order[place < per_reference][:count]


def _f_mem(generated: Neighbours, baseline: Neighbours | None, references: int) -> Findings:
    if references < 2:
        return Findings(not_measured={"f_mem": _too_few(2, references)})
    ours, theirs = ratios(generated), None if baseline is None else ratios(baseline)
    metric = _share(ours < MEMORIZED).against(None if theirs is None else float((theirs < MEMORIZED).mean()))
    return Findings({"f_mem": metric}, histograms={"ratio": histogram(BINS, generated=ours, baseline=theirs)})


def _mq(generated: Neighbours, baseline: Neighbours | None, references: int) -> Findings:
    names = {delta: f"mq_{delta:g}" for delta in DELTAS}
    if references < MQ_NEIGHBOURS:
        return Findings(not_measured=dict.fromkeys(names.values(), _too_few(MQ_NEIGHBOURS, references)))
    ours, theirs = mq_ratios(generated), None if baseline is None else mq_ratios(baseline)
    metrics = {
        name: _share(ours < delta).against(None if theirs is None else float((theirs < delta).mean()))
        for delta, name in names.items()
    }
    small = f"the reference set of {references} images is small for MQ: its {MQ_NEIGHBOURS} nearest are hardly near, "
    small += "so compare MQ only with audits of as many training images"
    return Findings(
        metrics,
        warnings=[small] if references < FEW_FOR_MQ else [],
        histograms={"mq_ratio": histogram(BINS, generated=ours, baseline=theirs)},
    )


def _extracted(neighbours: Neighbours, references: int) -> np.ndarray:
    """(references,) bool."""
    found = np.zeros(references, dtype=bool)
    found[neighbours.index[ratios(neighbours) < MEMORIZED, 0]] = True
    return found


def _unequal(neighbours: Neighbours, baseline: Neighbours | None) -> list[str]:
    """A warning where the two numbers of images differ."""
    if baseline is None or len(baseline.index) == len(neighbours.index):
        return []
    tries = f"{len(neighbours.index)} generated images against {len(baseline.index)} held-out ones"
    return [f"extraction compares {tries}: more images also hit more training images by chance"]


def _suffix(label: str) -> str:
    low, high = next((low, high) for name, low, high in REPEATS if name == label)
    if low == high:
        return f"x{low}"
    return f"x{low}_up" if math.isinf(high) else f"x{low}_{high}"


def _too_few(needed: int, references: int) -> str:
    return f"needs {needed} distinct training images, but the data has {references}"


def _p90(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.9))


def _p95(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.95))


def _quotient(nearest: np.ndarray, other: np.ndarray) -> np.ndarray:
    """nearest / other, and 0 where nearest is 0."""
    return np.divide(nearest, other, out=np.zeros_like(nearest), where=nearest > 0)


def _share(which: np.ndarray) -> Metric:
    return rate(int(which.sum()), len(which))
