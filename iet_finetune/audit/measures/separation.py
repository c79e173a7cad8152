"""Separating two sets of scores: the area under the ROC curve, and true positives at few false ones."""

from functools import partial

import numpy as np

from .metrics import Metric, bootstrap

FPR = 0.01
BINS = 40


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a member scores above another, equal scores counting half.

    The statistic U of Mann and Whitney (1947) over N M. Scores (N,) and (M,); 0.5 is what chance gives.

    Raises:
        ValueError: there are no members, or no others.
    """
    return _auc(*_ranked(members, others))


def tpr_at_fpr(members: np.ndarray, others: np.ndarray, fpr: float = FPR) -> float:
    """The largest share of the members that can be named while naming at most a share `fpr` of the others.

    Those are named that score above a threshold: the (k + 1)-th highest score of the M others, k = floor(fpr M). No
    lower one names so few others. With M < 1 / fpr none of them may be named. An attack that names few members but
    those for sure is a leak that the AUC does not show (Carlini et al., "Membership Inference Attacks From First
    Principles", 2022).

    Raises:
        ValueError: there are no members, or no others.
    """
    return _tpr(*_ranked(members, others), fpr=fpr)


def chance_tpr(others: int, fpr: float = FPR) -> float:
    """What `tpr_at_fpr` is on average if the scores say nothing: (k + 1) / (M + 1), more than `fpr` with few others.

    A member is then as likely in any of the M + 1 places between the others, and named in the k + 1 highest.
    """
    return min(_named(others, fpr) + 1, others + 1) / (others + 1)


def auc_metric(members: np.ndarray, others: np.ndarray, seed: int = 0) -> Metric:
    """`auc` with the interval of a bootstrap over both sets."""
    return bootstrap(_auc, *_ranked(members, others), seed=seed).against(0.5)


def tpr_metric(members: np.ndarray, others: np.ndarray, fpr: float = FPR, seed: int = 0) -> Metric:
    """`tpr_at_fpr` with the interval of a bootstrap over both sets, and what chance gives with so many others."""
    return bootstrap(partial(_tpr, fpr=fpr), *_ranked(members, others), seed=seed).against(
        chance_tpr(len(others), fpr)
    )


def _ranked(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores as the places of their values in the order of all, equal ones the same: a bootstrap sorts only once."""
    if not (len(members) and len(others)):
        raise ValueError("there must be members and others")
    both = np.concatenate([members, others])
    if not np.isfinite(both).all():
        raise ValueError("scores must be finite")
    ranks = np.unique(both, return_inverse=True)[1]
    return ranks[: len(members)], ranks[len(members) :]


def _counts(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = max(members.max(), others.max()) + 1
    return np.bincount(members, minlength=size), np.bincount(others, minlength=size)


def _auc(members: np.ndarray, others: np.ndarray) -> float:
    has, hasnt = _counts(members, others)
    below = np.cumsum(hasnt) - hasnt / 2
    return float(has @ below) / (len(members) * len(others))


def _tpr(members: np.ndarray, others: np.ndarray, fpr: float) -> float:
    most = _named(len(others), fpr)
    if most >= len(others):
        return 1.0
    has, hasnt = _counts(members, others)
    above = len(others) - np.cumsum(hasnt)
    threshold = int(np.argmax(above <= most))  # the lowest that is allowed
    return float(has[threshold + 1 :].sum()) / len(members)


def _named(others: int, fpr: float) -> int:
    """floor(fpr M), not one less where fpr M is a whole number but for rounding."""
    return int(np.floor(fpr * others + 1e-9))


def common_edges(*samples: np.ndarray, bins: int = BINS) -> np.ndarray:
    """(bins + 1,) edges over all but the outermost 1 % of the numbers together, against outliers."""
    low, high = np.quantile(np.concatenate(samples), [0.005, 0.995])
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1)
