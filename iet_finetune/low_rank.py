"""The exact merge of LoRA adapters: Σ_k n_k B_k A_k / Σ_k n_k by thin QR and a small SVD, in float64."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# A singular value below this share of Σ_i |up_i| |down_i| is the rounding of float64 and nothing else: Householder QR
# errs in every column by a few ε of that column's length, so the product errs by a few ε of this sum.
TOLERANCE = 16 * torch.finfo(torch.float64).eps
# A row of which the rows before leave no larger share than this is no new direction.
_NEW = 1e-6


class LowRank(NamedTuple):
    """The matrix up · down, kept as its factors.

    Attributes:
        up: (m, r) of any floating dtype; LoRA's B.
        down: (r, n); LoRA's A.
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """r, the width of the factors; the rank of the matrix may be smaller."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.up.shape[0], self.down.shape[1]

    def energy(self) -> float:
        """The squared Frobenius norm, without forming the matrix.

        From the triangles of both factors: Gram matrices would lose half of the digits where columns cancel.
        """
        left, right = (torch.linalg.qr(factor, mode="r").R for factor in (_float64(self.up), _float64(self.down).mT))
        return (left @ right.mT).square().sum().item()

    def dense(self) -> Tensor:
        """(m, n) float64."""
        return _float64(self.up) @ _float64(self.down)


class Merged(NamedTuple):
    """One layer after a merge; kept + rest is the exact update.

    Attributes:
        kept: the adapter that trains on, of exactly the rank that was asked for, float64.
        rest: the frozen remainder, float64: factors (of rank 0 where nothing is left), or (m, n) where those would be
            wider than half the smaller side.
        lost_share: energy of the rest / (energy of the kept + energy of the rest), 0 to 1.
    """

    kept: LowRank
    rest: LowRank | Tensor
    lost_share: float


class _Spectrum(NamedTuple):
    """Singular vectors and values above rounding: left (m, p), values (p,) falling, right (p, n)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def part(self, start: int, stop: int | None) -> LowRank:
        """The singular values from `start` to before `stop`, in balanced factors U √S and √S Vᵀ."""
        roots = self.values[start:stop].sqrt()
        return LowRank(self.left[:, start:stop] * roots, roots[:, None] * self.right[start:stop])


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
    ups = [_float64(part.up) * weight for part, weight in zip(parts, weights, strict=True)]
    total = sum(weights) if total is None else total
    return LowRank(torch.cat(ups, dim=1) / total, torch.cat([_float64(part.down) for part in parts]))


@torch.no_grad()
def compress(matrix: LowRank, tolerance: float = TOLERANCE) -> LowRank:
    """The same matrix in as few columns as it needs, as the balanced factors U √S and √S Vᵀ.

    The columns of `up` and the rows of `down` are orthogonal and of equal length, √σ, σ falling; the largest component
    of every column of `up` is positive.

    Args:
        tolerance: singular values up to this share of Σ_i |up_i| |down_i| are dropped.

    Raises:
        ValueError: a number is not finite.
    """
    return _spectrum(matrix, tolerance).part(0, None)


@torch.no_grad()
def split(matrix: LowRank, rank: int, spare: Tensor | None = None) -> tuple[LowRank, LowRank, float]:
    """The best approximation of rank `rank`, what it leaves, and the share of the energy in that.

    The factors are balanced as those of `compress`. Where the matrix has fewer singular values than `rank`, the
    first factor is filled up: with columns of 0 in `up`, and in `down` with orthogonal directions that are not there
    yet, so that the adapter can still learn them; were both 0, no gradient would ever reach either.

    Args:
        spare: (c, n), rows from which those directions are taken first, and whose root mean square length they get;
            `matrix.down` if None.

    Returns:
        the kept part, of exactly `rank` columns; the rest, of rank 0 if nothing is left; 0 to 1.

    Raises:
        ValueError: the rank is not positive, or a number is not finite.
    """
    _check_rank(rank)
    spectrum = _spectrum(matrix, TOLERANCE)
    kept = _filled(spectrum.part(0, rank), rank, _float64(matrix.down if spare is None else spare))
    energies = spectrum.values.square()
    share = (energies[rank:].sum() / energies.sum()).item() if len(energies) > rank else 0.0
    return kept, spectrum.part(rank, None), share


@torch.no_grad()
def merge_layer(
    clones: Sequence[LowRank], weights: Sequence[float], rank: int, remainder: LowRank | Tensor | None = None
) -> Merged:
    """Merges one layer of K adapters exactly: kept + rest = remainder + Σ_k n_k B_k A_k / Σ_k n_k.

    Clones that are equal bit for bit come back as they are, and so does the remainder: one clone is not changed by
    the merges between its rounds, nor are several by a learning rate of 0.

    Args:
        clones: the K updates in shard order, their scaling folded in (`fold_scaling`).
        weights: one positive number each, best integers.
        rank: of the adapter that trains on.
        remainder: what the merge before left: its `rest`; None for none.

    Raises:
        ValueError: as `weighted_sum` and `split` do, or the remainder has another shape.
    """
    _check_sum(clones, weights)
    _check_rank(rank)
    m, n = clones[0].shape
    if remainder is None:
        remainder = LowRank(clones[0].up.new_zeros(m, 0), clones[0].down.new_zeros(0, n))
    if tuple(remainder.shape) != (m, n):
        raise ValueError(f"the remainder has shape {tuple(remainder.shape)}, the update {(m, n)}")
    if clones[0].rank == rank and all(_equal(clones[0], clone) for clone in clones[1:]):
        same, left = LowRank(*map(_float64, clones[0])), _as_float64(remainder)
        _scale(same)  # refuses what is not finite, as the other way does
        return Merged(same, left, _share(same, left))
    update = weighted_sum(clones, weights)
    if isinstance(remainder, Tensor):
        return _split_dense(_float64(remainder), update, rank)
    total = weighted_sum([update, remainder], [1, 1], total=1) if remainder.rank else update
    kept, rest, share = split(total, rank, spare=update.down)
    return Merged(kept, rest.dense() if 2 * rest.rank > min(m, n) else rest, share)


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
    up, down = map(_float64, matrix)
    left, _, right = torch.linalg.svd(up.mT @ _float64(like.up) + down @ _float64(like.down).mT)
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
    return LowRank(_float64(factors.up) * root, _float64(factors.down) * root)


def unfold_scaling(update: LowRank, scaling: float) -> LowRank:
    """The factors B and A, float64, of which scaling · B A is the update."""
    root = _root(scaling)
    return LowRank(_float64(update.up) / root, _float64(update.down) / root)


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


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64)


def _as_float64(matrix: LowRank | Tensor) -> LowRank | Tensor:
    return _float64(matrix) if isinstance(matrix, Tensor) else LowRank(*map(_float64, matrix))


def _equal(one: LowRank, other: LowRank) -> bool:
    return torch.equal(one.up, other.up) and torch.equal(one.down, other.down)


def _root(scaling: float) -> float:
    if not 0 < scaling < math.inf:
        raise ValueError(f"LoRA's scaling must be positive, not {scaling}")
    return math.sqrt(scaling)


def _scale(matrix: LowRank, remainder: Tensor | None = None) -> float:
    """Σ_i |up_i| |down_i| + |remainder|, of which the rounding of the sum is a few ε."""
    scale = (matrix.up.norm(dim=0) @ matrix.down.norm(dim=1)).item()
    scale += 0 if remainder is None else remainder.norm().item()
    if not math.isfinite(scale):
        raise ValueError("an update has numbers that are not finite")
    return scale


def _share(kept: LowRank, rest: LowRank | Tensor) -> float:
    """The energy of the rest as a share of both; of the whole matrix, as far as both are orthogonal."""
    lost = rest.square().sum().item() if isinstance(rest, Tensor) else rest.energy()
    return lost / (kept.energy() + lost) if lost else 0.0


def _spectrum(matrix: LowRank, tolerance: float) -> _Spectrum:
    """up = Q R and downᵀ = P T, so up · down = Q (R Tᵀ) Pᵀ, and only R Tᵀ, of the factors' width, needs an SVD."""
    left, right = torch.linalg.qr(_float64(matrix.up)), torch.linalg.qr(_float64(matrix.down).mT)
    floor = tolerance * _scale(LowRank(left.R, right.R.mT))  # the triangles' columns are as long as the factors'
    core = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    count = int(core.S.gt(floor).sum())
    return _signed(left.Q @ core.U[:, :count], core.S[:count], core.Vh[:count] @ right.Q.mT)


def _signed(left: Tensor, values: Tensor, right: Tensor) -> _Spectrum:
    """An SVD leaves the sign of each pair of vectors open; here the left one's largest component is positive."""
    negative = left.amin(dim=0).neg() > left.amax(dim=0)
    signs = torch.where(negative, -1.0, 1.0).to(left)
    return _Spectrum(left * signs, values, signs[:, None] * right)


def _split_dense(remainder: Tensor, update: LowRank, rank: int) -> Merged:
    """As `split` of remainder + update, with a dense rest: the difference, so that nothing is lost."""
    total = torch.addmm(remainder, update.up, update.down)
    floor = TOLERANCE * _scale(update, remainder)
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    count = min(rank, int(values.gt(floor).sum()))
    kept = _filled(_signed(left[:, :count], values[:count], right[:count]).part(0, None), rank, update.down)
    rest = total.addmm_(kept.up, kept.down, alpha=-1)
    return Merged(kept, rest, _share(kept, rest))


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
        if part.down.shape[0] != part.rank:
            raise ValueError(f"factors of rank {part.rank} and {part.down.shape[0]} make no update")


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"an adapter's rank must be positive, not {rank}")
