"""The exact merge of LoRA adapters: Σ_k n_k B_k A_k / Σ_k n_k by thin QR and a small SVD, in float64."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .spectra import TOLERANCE, LowRank, Matrix, float64, leading, scale_of, spectrum
from .splitting import check_rank, energy_share, narrow, nothing, split, split_dense


class Merged(NamedTuple):
    """One layer after a merge; kept + rest is the exact update.

    Attributes:
        kept: the adapter that trains on, of exactly the rank that was asked for, float64.
        rest: the frozen remainder, float64: factors (of rank 0 where nothing is left), or (m, n) where those would be
            wider than half the smaller side.
        lost_share: energy of the rest / (energy of the kept + energy of the rest), 0 to 1.
    """

    kept: LowRank
    rest: Matrix
    lost_share: float


@torch.no_grad()
def weighted_sum(parts: Sequence[LowRank], weights: Sequence[float], total: float | None = None) -> LowRank:
    """Σ_k w_k up_k down_k / total, exactly: the factors side by side, in the order given.

    Args:
        parts: at least one, all with the same m and n; their ranks may differ.
        weights: one positive number each. With integers (numbers of images) below 2^29 and fp32 factors the products
            are exact, and the division rounds once.
        total: what to divide by; Σ_k w_k if None.

    Returns:
        float64 factors of rank Σ_k r_k.

    Raises:
        ValueError: no part, other number of weights, a weight that is not positive, or different shapes.
    """
    _check_sum(parts, weights)
    ups = [float64(part.up) * weight for part, weight in zip(parts, weights, strict=True)]
    total = sum(weights) if total is None else total
    return LowRank(torch.cat(ups, dim=1) / total, torch.cat([float64(part.down) for part in parts]))


@torch.no_grad()
def combine(terms: Sequence[tuple[float, Matrix]]) -> Matrix:
    """Σ_i c_i M_i in float64, exactly but for rounding.

    Args:
        terms: at least one pair (c_i, M_i), the matrices of one shape (m, n), the numbers of any sign. Those of 0 only
            give the shape.

    Returns:
        factors as `compress` makes them, as long as they are at most half as wide as the smaller side and no term is
        dense; else (m, n), a tensor of its own. Factors alone are compressed before any matrix is formed of them.

    Raises:
        ValueError: no term, different shapes, or a number that is not finite.
    """
    _check_terms(terms)
    first, used = terms[0][1], [(coefficient, matrix) for coefficient, matrix in terms if coefficient]
    parts = [LowRank(coefficient * float64(m.up), m.down) for coefficient, m in used if isinstance(m, LowRank)]
    total = weighted_sum(parts, [1] * len(parts), total=1) if parts else nothing(first)
    dense = [(coefficient, matrix) for coefficient, matrix in used if isinstance(matrix, Tensor)]
    if not dense:
        return narrow(compress(total))
    result = total.dense()
    for coefficient, matrix in dense:
        result.add_(matrix, alpha=coefficient)
    return result


@torch.no_grad()
def compress(matrix: Matrix, tolerance: float = TOLERANCE) -> LowRank:
    """The same matrix in as few columns as it needs, as the balanced factors U √S and √S Vᵀ.

    The columns of `up` and the rows of `down` are orthogonal and of equal length, √σ, σ falling; the largest component
    of every column of `up` is positive.

    Args:
        matrix: dense, or factors, which are not multiplied out.
        tolerance: singular values up to this share of Σ_i |up_i| |down_i|, or of a dense matrix's norm, are dropped.

    Raises:
        ValueError: a number is not finite.
    """
    return spectrum(matrix, tolerance).part(0, None)


@torch.no_grad()
def cut(matrix: Matrix, rank: int) -> LowRank:
    """The best of a rank that is near the matrix, as `split` finds it, in balanced factors; itself if it is narrower.

    Args:
        matrix: dense, or factors.
        rank: 0 or more columns that may remain.

    Raises:
        ValueError: a number is not finite.
    """
    if isinstance(matrix, LowRank) and matrix.rank <= rank:
        return matrix
    exact = _as_float64(matrix)
    return leading(exact, rank, TOLERANCE * scale_of(exact)).part(0, None)


@torch.no_grad()
def merge_layer(
    clones: Sequence[LowRank], weights: Sequence[float], rank: int, remainder: Matrix | None = None
) -> Merged:
    """Merges one layer of K adapters exactly: kept + rest = remainder + Σ_k n_k B_k A_k / Σ_k n_k.

    Clones that are equal bit for bit come back as they are, and so does the remainder: one clone is not changed by
    the merges between its rounds, nor are several by a learning rate of 0. Else kept is the best of its rank, as
    `split` finds it.

    Args:
        clones: the K updates in shard order, their scaling folded in (`fold_scaling`).
        weights: one positive number each, best integers.
        rank: of the adapter that trains on.
        remainder: what the merge before left: its `rest`; None for none. Where it is dense, so is the new one.

    Raises:
        ValueError: as `weighted_sum` and `split` do, or the remainder has another shape.
    """
    _check_sum(clones, weights)
    check_rank(rank)
    remainder = nothing(clones[0]) if remainder is None else remainder
    if tuple(remainder.shape) != clones[0].shape:
        raise ValueError(f"the remainder has shape {tuple(remainder.shape)}, the update {clones[0].shape}")
    if clones[0].rank == rank and all(_equal(clones[0], clone) for clone in clones[1:]):
        same, left = LowRank(*map(float64, clones[0])), _as_float64(remainder)
        scale_of(same)  # refuses what is not finite, as the other way does
        return Merged(same, left, energy_share(same, left))
    update = weighted_sum(clones, weights)
    if isinstance(remainder, Tensor):
        dense = torch.addmm(float64(remainder), update.up, update.down)
        return Merged(*split_dense(dense, rank, scale_of(update, remainder), update.down))
    total = weighted_sum([update, remainder], [1, 1], total=1) if remainder.rank else update
    return Merged(*split(total, rank, spare=update.down))


@torch.no_grad()
def align(matrix: LowRank, like: LowRank) -> LowRank:
    """The same matrix as (up Q)(Qᵀ down), with the orthogonal Q that brings both factors nearest to those of `like`.

    For optimizer state that outlives a merge: it belongs to the columns in which the clones trained, and a new SVD
    turns and reorders the columns at will. Orthogonal Procrustes: Q = U Vᵀ of upᵀ up' + down down'ᵀ.

    Args:
        matrix, like: of the same shape and rank.

    Returns:
        float64; balanced (upᵀ up = down downᵀ) if `matrix` is, its columns no longer orthogonal.
    """
    if (matrix.shape, matrix.rank) != (like.shape, like.rank):
        raise ValueError(f"a {matrix.shape} of rank {matrix.rank} cannot be turned to {like.shape}, rank {like.rank}")
    up, down = map(float64, matrix)
    left, _, right = torch.linalg.svd(up.mT @ float64(like.up) + down @ float64(like.down).mT)
    turn = left @ right
    return LowRank(up @ turn, turn.mT @ down)


def _as_float64(matrix: Matrix) -> Matrix:
    return float64(matrix) if isinstance(matrix, Tensor) else LowRank(*map(float64, matrix))


def _equal(one: LowRank, other: LowRank) -> bool:
    return torch.equal(one.up, other.up) and torch.equal(one.down, other.down)


def _check_sum(parts: Sequence[LowRank], weights: Sequence[float]) -> None:
    if not parts or len(parts) != len(weights):
        raise ValueError(f"a sum needs at least one update and as many weights, not {len(parts)} and {len(weights)}")
    for part, weight in zip(parts, weights, strict=True):
        if not 0 < weight < math.inf:
            raise ValueError(f"an update's weight must be positive, not {weight}")
        if part.shape != parts[0].shape:
            raise ValueError(f"an update has shape {part.shape}, the first one {parts[0].shape}")
        _check_pair(part)


def _check_terms(terms: Sequence[tuple[float, Matrix]]) -> None:
    if not terms:
        raise ValueError("a sum needs at least one term")
    first = tuple(terms[0][1].shape)
    for coefficient, matrix in terms:
        if not math.isfinite(coefficient):
            raise ValueError(f"a coefficient must be finite, not {coefficient}")
        if tuple(matrix.shape) != first:
            raise ValueError(f"a term has shape {tuple(matrix.shape)}, the first one {first}")
        if isinstance(matrix, LowRank):
            _check_pair(matrix)
        scale_of(matrix)


def _check_pair(part: LowRank) -> None:
    if part.down.shape[0] != part.rank:
        raise ValueError(f"factors of rank {part.rank} and {part.down.shape[0]} make no update")
