"""The exact merge of LoRA adapters: Σ_k n_k B_k A_k / Σ_k n_k by thin QR and a small SVD, in float64."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .spectra import SMALL, TOLERANCE, LowRank, Matrix, energy, float64, leading, scale_of, spectrum

__all__ = [
    "TOLERANCE",
    "LowRank",
    "Matrix",
    "Merged",
    "align",
    "as_matrix",
    "as_weights",
    "combine",
    "compress",
    "fold_scaling",
    "lora_scaling",
    "merge_layer",
    "split",
    "unfold_scaling",
    "weighted_sum",
]

# A row of which the rows before leave no larger share than this is no new direction.
_NEW = 1e-6


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
    total = weighted_sum(parts, [1] * len(parts), total=1) if parts else _nothing(first)
    dense = [(coefficient, matrix) for coefficient, matrix in used if isinstance(matrix, Tensor)]
    if not dense:
        return _narrow(compress(total))
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
def split(matrix: Matrix, rank: int, spare: Tensor | None = None) -> tuple[LowRank, Matrix, float]:
    """The best approximation of rank `rank`, what it leaves, and the share of the energy in that.

    Best but for rounding where the smaller side, or the width of the factors, is at most 256. Of a larger matrix the
    kept part holds at least 1 - 1e-6 of the energy that the best could (`spectra.leading`). Kept and rest add
    up to the matrix, and their energies to its own, but for rounding in any case.

    The factors are balanced as those of `compress`. Where the matrix has fewer singular values than `rank`, the
    first factor is filled up: with columns of 0 in `up`, and in `down` with orthogonal directions that are not there
    yet, so that the adapter can still learn them; were both 0, no gradient would ever reach either.

    Args:
        spare: (c, n), rows from which those directions are taken first, and whose root mean square length they get;
            if None, `matrix.down`, or for a dense matrix unit vectors.

    Returns:
        the kept part, of exactly `rank` columns; the rest, of rank 0 if nothing is left, and dense where the matrix is
        or where its factors would be wider than half the smaller side (those wider than 256 are not compressed); 0 to
        1.

    Raises:
        ValueError: the rank is not positive, or a number is not finite.
    """
    _check_rank(rank)
    if isinstance(matrix, Tensor):
        total = matrix.detach().to(torch.float64, copy=True)
        return _split_dense(total, rank, scale_of(matrix), total[:0] if spare is None else float64(spare))
    spare = float64(matrix.down if spare is None else spare)
    if min(matrix.rank, *matrix.shape) > SMALL:
        return _split_wide(LowRank(*map(float64, matrix)), rank, spare)
    whole = spectrum(matrix, TOLERANCE)
    energies = whole.values.square()
    share = (energies[rank:].sum() / energies.sum()).item() if len(energies) > rank else 0.0
    return _filled(whole.part(0, rank), rank, spare), _narrow(whole.part(rank, None)), share


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
    _check_rank(rank)
    remainder = _nothing(clones[0]) if remainder is None else remainder
    if tuple(remainder.shape) != clones[0].shape:
        raise ValueError(f"the remainder has shape {tuple(remainder.shape)}, the update {clones[0].shape}")
    if clones[0].rank == rank and all(_equal(clones[0], clone) for clone in clones[1:]):
        same, left = LowRank(*map(float64, clones[0])), _as_float64(remainder)
        scale_of(same)  # refuses what is not finite, as the other way does
        return Merged(same, left, _share(same, left))
    update = weighted_sum(clones, weights)
    if isinstance(remainder, Tensor):
        dense = torch.addmm(float64(remainder), update.up, update.down)
        return Merged(*_split_dense(dense, rank, scale_of(update, remainder), update.down))
    total = weighted_sum([update, remainder], [1, 1], total=1) if remainder.rank else update
    return Merged(*split(total, rank, spare=update.down))


@torch.no_grad()
def align(matrix: LowRank, like: LowRank) -> LowRank:
    """The same matrix as (up Q)(Qᵀ down), with the orthogonal Q that brings both factors nearest to those of `like`.

    For optimizer moments that outlive a merge: they belong to the columns in which the clones trained, and a new SVD
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


def lora_scaling(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """The factor before B A in LoRA's update: alpha / r, or alpha / √r with rsLoRA (arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def fold_scaling(factors: LowRank, scaling: float) -> LowRank:
    """The update scaling · B A of an adapter's factors B and A, half of it in each, so that balanced ones stay so.

    Float64; fp32 factors that `unfold_scaling` takes out of it again are, in fp32, the same bit for bit.
    """
    root = _root(scaling)
    return LowRank(float64(factors.up) * root, float64(factors.down) * root)


def unfold_scaling(update: LowRank, scaling: float) -> LowRank:
    """The factors B and A, float64, of which scaling · B A is the update."""
    root = _root(scaling)
    return LowRank(float64(update.up) / root, float64(update.down) / root)


def as_matrix(up_weight: Tensor, down_weight: Tensor) -> LowRank:
    """peft's `lora_B.weight` and `lora_A.weight` of a linear or convolution layer, as the factors of one matrix.

    up · down is then the update of the layer's weight, (out, in, kh, kw) as (out, in·kh·kw), without the scaling.

    Args:
        up_weight: (out, r), or (out, r, 1, 1) of a convolution.
        down_weight: (r, in), or (r, in, kh, kw).

    Raises:
        ValueError: the shapes are not those of such a pair; a grouped convolution's are not.
    """
    up, down = up_weight.detach().flatten(1), down_weight.detach().flatten(1)
    if up_weight.dim() != down_weight.dim() or up.shape[1] != down.shape[0] or math.prod(up_weight.shape[2:]) != 1:
        shapes = f"{tuple(up_weight.shape)} and {tuple(down_weight.shape)}"
        raise ValueError(f"weights of shape {shapes} are not the up and down of one layer without groups")
    return LowRank(up, down)


def as_weights(matrix: LowRank, up_like: Tensor, down_like: Tensor) -> tuple[Tensor, Tensor]:
    """Factors as weights of a layer whose own look like these but may have another rank; what `as_matrix` undoes.

    Returns:
        (out, r) and (r, in), or (out, r, 1, 1) and (r, in, kh, kw), of the same dtype and device as those.
    """
    up = matrix.up.reshape(matrix.up.shape[0], matrix.rank, *up_like.shape[2:])
    down = matrix.down.reshape(matrix.rank, *down_like.shape[1:])
    return up.to(up_like), down.to(down_like)


def _as_float64(matrix: Matrix) -> Matrix:
    return float64(matrix) if isinstance(matrix, Tensor) else LowRank(*map(float64, matrix))


def _equal(one: LowRank, other: LowRank) -> bool:
    return torch.equal(one.up, other.up) and torch.equal(one.down, other.down)


def _root(scaling: float) -> float:
    if not 0 < scaling < math.inf:
        raise ValueError(f"LoRA's scaling must be positive, not {scaling}")
    return math.sqrt(scaling)


def _share(kept: LowRank, rest: Matrix) -> float:
    """The energy of the rest as a share of both; of the whole matrix, as far as both are orthogonal."""
    lost = energy(rest)
    return lost / (kept.energy() + lost) if lost else 0.0


def _nothing(like: Matrix) -> LowRank:
    """The 0 of the same shape, of rank 0, in float64."""
    (m, n), tensor = like.shape, like if isinstance(like, Tensor) else like.up
    return LowRank(*(tensor.new_zeros(shape, dtype=torch.float64) for shape in ((m, 0), (0, n))))


def _narrow(matrix: LowRank) -> Matrix:
    """Dense where the factors are wider than half the smaller side: then they are hardly smaller, and slower."""
    return matrix.dense() if 2 * matrix.rank > min(matrix.shape) else matrix


def _split_dense(total: Tensor, rank: int, scale: float, spare: Tensor) -> tuple[LowRank, Tensor, float]:
    """As `split`, of a float64 matrix that becomes the rest: the difference, so that nothing is lost."""
    kept = _filled(leading(total, rank, TOLERANCE * scale).part(0, None), rank, spare)
    rest = total.addmm_(kept.up, kept.down, alpha=-1)
    return kept, rest, _share(kept, rest)


def _split_wide(total: LowRank, rank: int, spare: Tensor) -> tuple[LowRank, Matrix, float]:
    """As `split`, of many float64 columns: `leading` leaves (I - U Uᵀ) M or M (I - V Vᵀ), which is as wide as M."""
    scale = scale_of(total)
    found = leading(total, rank, TOLERANCE * scale)
    kept = _filled(found.part(0, None), rank, spare)
    up, down = total
    if up.shape[0] < down.shape[1]:
        up = up - found.left @ (found.left.mT @ up)
    else:
        down = down - (down @ found.right.mT) @ found.right
    rest = _narrow(LowRank(up, down))
    lost = energy(rest)
    if math.sqrt(lost) <= TOLERANCE * scale:
        return kept, _nothing(total), 0.0
    return kept, rest, lost / (found.values.square().sum().item() + lost)


def _filled(matrix: LowRank, rank: int, spare: Tensor) -> LowRank:
    """The same matrix in `rank` columns: new ones of 0 in `up`, new directions in `down`, as long as spare's rows."""
    missing = rank - matrix.rank
    if not missing:
        return matrix
    length = spare.square().sum(dim=1).mean().sqrt().item() if spare.numel() else 0.0
    new = _new_directions(matrix.down, spare, missing) * (length or 1.0)
    return LowRank(nn.functional.pad(matrix.up, (0, missing)), torch.cat([matrix.down, new]))


def _new_directions(taken: Tensor, spare: Tensor, count: int) -> Tensor:
    """(count, n) unit rows orthogonal to those taken and to each other, by Gram-Schmidt; repeated if n is too small.

    Unit vectors follow the spare rows; as many of them as rows are wanted cannot all lie in the span of fewer.

    Args:
        taken: (p, n), orthogonal and not 0.
        spare: (c, n), tried first, in their order.
    """
    directions = taken / taken.norm(dim=1, keepdim=True)
    n, wanted = taken.shape[1], taken.shape[0] + count
    for row in torch.cat([spare, torch.eye(min(wanted, n), n).to(spare)]):
        if directions.shape[0] == wanted:
            break
        left = row
        for _ in range(2):  # once leaves a rounding that is large beside what is left; twice is enough
            left = left - (directions @ left) @ directions
        if left.norm() > _NEW * row.norm():
            directions = torch.cat([directions, left[None] / left.norm()])
    return directions[torch.arange(taken.shape[0], wanted, device=directions.device) % directions.shape[0]]


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


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"an adapter's rank must be positive, not {rank}")
