"""Quality and variety of the generated images: their features against those of held-out images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from .clip import ClipScorer as ClipScorer
from .clip import clip_findings as clip_findings
from .clip import load_clip as load_clip
from .findings import Findings
from .metrics import CONFIDENCE, RESAMPLES, Metric, bootstrap, mean, rate

# What `quality_findings` measures; each name is followed by the slug of the features.
OF_QUALITY = ("kid", "frechet", "precision", "recall", "density", "coverage")
# Of precision, recall, density and coverage; as Naeem et al. (2020) recommend.
NEIGHBOURS = 5
# Images a side that KID and the neighbourhoods are computed from: a kernel matrix of 5,000 x 5,000 takes 200 MB.
MOST = 5000
# Below this many images a side a Fréchet distance says more about their number than about them.
FEW = 1000
# Images a side that its spread is estimated from, and how often they are drawn anew.
_SPREAD_IMAGES, _SPREAD_RESAMPLES = 1000, 50
_ROWS = 1000


def quality_findings(
    slug: str,
    title: str,
    generated: np.ndarray,
    heldout: np.ndarray,
    training: np.ndarray | None,
    seed: int,
) -> Findings:
    """Compares the generated images with held-out ones by their features.

    The baseline of each metric is the same with training images in place of the generated ones, as many as there are
    of those or all of them: what a perfect copyist would score.

    Args:
        slug, title: of the features.
        generated: (G, D) features.
        heldout: (H, D), the real images.
        training: (N, D), for the baseline.
        seed: of subsets and of the bootstrap.

    Returns:
        kid_SLUG: the unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³ (Bińkowski et al., 2018)
            of at most `MOST` images a side; it may be negative. Its interval is that of the bootstrap.
        frechet_SLUG: the distance of Heusel et al. (2017), in these features, so that it is no FID; its interval is
            the value plus and minus 1.96 standard deviations of the bootstrap. A warning says where it has no weight.
        precision_SLUG, recall_SLUG: the shares of generated images inside the real ones' neighbourhoods and of real
            ones inside the generated ones' (Kynkäänniemi et al., 2019).
        density_SLUG, coverage_SLUG: the mean number of the real ones' neighbourhoods that a generated image is in,
            over k, and the share of those that hold one (Naeem et al., 2020).
        A neighbourhood is the closed ball that reaches to the k-th nearest of the same set, k = `NEIGHBOURS`, among at
            most `MOST` images a side.
        Where there are too few images, the reason why it is not measured.
    """
    copies = None if training is None else _subset(training, len(generated), seed).astype(np.float64)
    sides = _Sides(generated.astype(np.float64), heldout.astype(np.float64), copies, seed)
    findings = Findings.merged(_kid(slug, sides), _frechet(slug, sides), _neighbourhoods(slug, sides))
    if f"frechet_{slug}" in findings.metrics and min(len(generated), len(heldout)) < FEW:
        findings.warnings.append(
            f"{title}: fewer than {FEW:,} generated or held-out images ({len(generated):,} and {len(heldout):,}): the "
            "Fréchet distance is biased upwards and carries no weight"
        )
    return findings


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """KID between two sets of features (n, D) and (m, D), without a bias, for n and m of at least 2.

    torchmetrics' takes both sets to be of one size, and draws subsets from the global generator.
    """
    return float(_kernel_distances(x, y, np.ones((1, len(x))), np.ones((1, len(y))))[0])


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The Fréchet distance between normal distributions with the moments of (n, D) and (m, D) features, n, m >= 2.

    torchmetrics computes it, in float64; rounding never takes it below 0.
    """
    # Alone: at the end of a run of several ranks, rank 0 audits and the others wait.
    distance = FrechetInceptionDistance(feature=_Given(x.shape[1]), sync_on_compute=False).set_dtype(torch.float64)
    distance.update(torch.from_numpy(x.astype(np.float64)), real=False)
    distance.update(torch.from_numpy(y.astype(np.float64)), real=True)
    return max(0.0, float(distance.compute()))


def prdc(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What precision, recall, density and coverage are the means of.

    Args:
        generated: (G, D) features.
        real: (R, D).
        k: the neighbour that a neighbourhood reaches to; less than G and R.

    Returns:
        For each generated image whether it is in a real one's neighbourhood (G,); for each real one whether it is in a
        generated one's (R,); for each generated one the number of real neighbourhoods it is in, over k (G,); for each
        real one whether its neighbourhood holds a generated one (R,).
    """
    generated_reach, real_reach = _reach(generated, k), _reach(real, k)
    counts = np.zeros(len(generated), np.int64)
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, distances in _squared_distances(generated, real):
        inside = distances <= real_reach
        counts[rows] = inside.sum(1)
        covered |= inside.any(0)
        recalled |= (distances <= generated_reach[rows, None]).any(0)
    return counts > 0, recalled, counts / k, covered


@dataclass(frozen=True)
class _Sides:
    """What is compared: features (n, D), float64; for the baseline `copies` replace the generated ones."""

    generated: np.ndarray
    heldout: np.ndarray
    copies: np.ndarray | None
    seed: int

    def too_few(self, needed: int) -> str | None:
        """Why so many images a side are not there, or None if they are."""
        counts = len(self.generated), len(self.heldout)
        if min(counts) >= needed:
            return None
        return f"needs at least {needed} generated and {needed} held-out images; there are {counts[0]} and {counts[1]}"

    def cut(self) -> "_Sides":
        """The same with at most `MOST` images each."""
        copies = None if self.copies is None else _subset(self.copies, MOST, self.seed)
        generated, heldout = (_subset(rows, MOST, self.seed) for rows in (self.generated, self.heldout))
        return _Sides(generated, heldout, copies, self.seed)

    def baseline(self, statistic: Callable[[np.ndarray, np.ndarray], float]) -> float | None:
        """The statistic of copies and held-out images, if there are two copies at least."""
        return None if self.copies is None or len(self.copies) < 2 else statistic(self.copies, self.heldout)


class _Given(nn.Module):
    """Takes features for the images that torchmetrics would compute them from."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.num_features = dimensions

    def forward(self, features: Tensor) -> Tensor:
        return features


def _subset(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """`most` rows of many, or all of few, in their order."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False))]


def _kid(slug: str, sides: _Sides) -> Findings:
    if reason := sides.too_few(2):
        return Findings(not_measured={f"kid_{slug}": reason})
    sides = sides.cut()
    value, low, high = _kid_interval(sides.generated, sides.heldout, np.random.default_rng(sides.seed))
    return Findings({f"kid_{slug}": Metric(value, low, high, sides.baseline(kernel_distance))})


def _kid_interval(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """KID and the percentile interval of its bootstrap; the first of the weights are those of the sets as they are."""
    weights = [np.concatenate([np.ones((1, n)), _redrawn(n, RESAMPLES, rng)]) for n in (len(x), len(y))]
    value, *drawn = _kernel_distances(x, y, *weights)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(value), float(low), float(high)


def _redrawn(n: int, times: int, rng: np.random.Generator) -> np.ndarray:
    """(times, n): how often each of n comes up in n draws, but never one of them alone: it has no pairs."""
    weights = rng.multinomial(n, np.full(n, 1 / n), times)
    while len(alone := np.flatnonzero(weights.max(1) == n)):
        weights[alone] = rng.multinomial(n, np.full(n, 1 / n), len(alone))
    return weights.astype(np.float64)


def _kernel_distances(x: np.ndarray, y: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """KID (R,) between x (n, D) with the weights of each row of v (R, n) and y (m, D) with those of w (R, m).

    A pair of an image and itself never counts, also where a weight has it several times.
    """
    own = sum(_mean_within(features, weights) for features, weights in ((x, v), (y, w)))
    between = np.einsum("rm,rm->r", v @ _kernel(x, y), w) / (v.sum(1) * w.sum(1))
    return own - 2 * between


def _mean_within(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    kernel = _kernel(x, x)
    np.fill_diagonal(kernel, 0)
    pairs = weights.sum(1) ** 2 - (weights**2).sum(1)
    return np.einsum("rn,rn->r", weights @ kernel, weights) / pairs


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kernel = x @ y.T
    kernel /= x.shape[1]
    kernel += 1
    kernel *= kernel * kernel
    return kernel


def _frechet(slug: str, sides: _Sides) -> Findings:
    if reason := sides.too_few(2):
        return Findings(not_measured={f"frechet_{slug}": reason})
    value = frechet_distance(sides.generated, sides.heldout)
    reach = _frechet_reach(sides.generated, sides.heldout, sides.seed)
    baseline = sides.baseline(frechet_distance)
    return Findings({f"frechet_{slug}": Metric(value, max(0.0, value - reach), value + reach, baseline)})


def _frechet_reach(x: np.ndarray, y: np.ndarray, seed: int) -> float:
    """How far the interval of the Fréchet distance reaches to either side.

    Of many images a subset is drawn anew, and its spread scaled by 1/√n; of two sides that are cut by different
    factors the one that leaves the wider interval counts.
    """
    few_x, few_y = _subset(x, _SPREAD_IMAGES, seed), _subset(y, _SPREAD_IMAGES, seed)
    spread = bootstrap(
        lambda i, j: _frechet_of_drawn(few_x, i, few_y, j),
        np.arange(len(few_x)),
        np.arange(len(few_y)),
        resamples=_SPREAD_RESAMPLES,
        seed=seed,
        centred=True,
    )
    return (spread.high - spread.value) * max(len(few_x) / len(x), len(few_y) / len(y)) ** 0.5


def _frechet_of_drawn(x: np.ndarray, i: np.ndarray, y: np.ndarray, j: np.ndarray) -> float:
    """The Fréchet distance between x[i] and y[j], fast enough to be computed fifty times.

    With A and B the centred features over √(n - 1), S = AᵀA their covariances, the trace of √(S₁S₂) is the nuclear
    norm of ABᵀ, whose sides are the numbers of different images.
    """
    (mean_x, a), (mean_y, b) = _moments(x, i), _moments(y, j)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(np.sum((mean_x - mean_y) ** 2) + np.sum(a * a) + np.sum(b * b) - 2 * cross)


def _moments(x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (D,) of x[rows], and a matrix A of at most D rows, where AᵀA is their covariance."""
    times = np.bincount(rows, minlength=len(x))
    x, times = x[times > 0], times[times > 0]
    centre = times @ x / len(rows)
    a = np.sqrt(times / (len(rows) - 1))[:, None] * (x - centre)
    return centre, np.asarray(np.linalg.qr(a, mode="r")) if len(a) > a.shape[1] else a


def _neighbourhoods(slug: str, sides: _Sides) -> Findings:
    names = [f"{name}_{slug}" for name in OF_QUALITY[2:]]
    if reason := sides.too_few(NEIGHBOURS + 1):
        return Findings(not_measured=dict.fromkeys(names, reason))
    sides = sides.cut()
    values = prdc(sides.generated, sides.heldout, NEIGHBOURS)
    baselines: list[float | None] = [None] * len(names)
    if sides.copies is not None and len(sides.copies) > NEIGHBOURS:
        baselines = [float(each.mean()) for each in prdc(sides.copies, sides.heldout, NEIGHBOURS)]
    metrics = [mean(each, sides.seed) if each.dtype != bool else rate(int(each.sum()), len(each)) for each in values]
    return Findings(
        {name: each.against(baseline) for name, each, baseline in zip(names, metrics, baselines, strict=True)}
    )


def _reach(x: np.ndarray, k: int) -> np.ndarray:
    """The squared distance (n,) from each of x (n, D) to the k-th nearest of the others."""
    reach = np.empty(len(x))
    for rows, distances in _squared_distances(x, x):
        distances[np.arange(len(distances)), np.arange(rows.start, rows.start + len(distances))] = np.inf
        reach[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    # The same two images are met again from the other side, with another last bit: what is on the rim is inside.
    return reach * (1 + 1e-9)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some rows of x (n, D) at a time, with their squared distances (rows, m) to all of y (m, D)."""
    squares = np.sum(y * y, axis=1)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        both = np.sum(x[rows] ** 2, axis=1)[:, None] + squares
        distances = both - 2 * (x[rows] @ y.T)
        # Less than this is what rounding leaves of the distance between equal features.
        distances[distances < 1e-12 * both] = 0
        yield rows, distances
