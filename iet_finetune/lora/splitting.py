"""A matrix split into the best one of a small rank, on which an adapter trains on, and the rest, which is frozen."""

import math

import torch
from torch import Tensor, nn

from .spectra import SMALL, TOLERANCE, LowRank, Matrix, energy, float64, leading, scale_of, spectrum

# A row of which the rows before leave no larger share than this is no new direction.
_NEW = 1e-6


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
    check_rank(rank)
    if isinstance(matrix, Tensor):
        total = matrix.detach().to(torch.float64, copy=True)
        return split_dense(total, rank, scale_of(matrix), total[:0] if spare is None else float64(spare))
    spare = float64(matrix.down if spare is None else spare)
    if min(matrix.rank, *matrix.shape) > SMALL:
        return _split_wide(LowRank(*map(float64, matrix)), rank, spare)
    whole = spectrum(matrix, TOLERANCE)
    energies = whole.values.square()
    share = (energies[rank:].sum() / energies.sum()).item() if len(energies) > rank else 0.0
    return _filled(whole.part(0, rank), rank, spare), narrow(whole.part(rank, None)), share


def energy_share(kept: LowRank, rest: Matrix) -> float:
    """The energy of the rest as a share of both; of the whole matrix, as far as both are orthogonal."""
    lost = energy(rest)
    return lost / (kept.energy() + lost) if lost else 0.0


def nothing(like: Matrix) -> LowRank:
    """The 0 of the same shape, of rank 0, in float64."""
    (m, n), tensor = like.shape, like if isinstance(like, Tensor) else like.up
    return LowRank(*(tensor.new_zeros(shape, dtype=torch.float64) for shape in ((m, 0), (0, n))))


def narrow(matrix: LowRank) -> Matrix:
    """Dense where the factors are wider than half the smaller side: then they are hardly smaller, and slower."""
    return matrix.dense() if 2 * matrix.rank > min(matrix.shape) else matrix


def split_dense(total: Tensor, rank: int, scale: float, spare: Tensor) -> tuple[LowRank, Tensor, float]:
    """As `split`, of a float64 matrix that becomes the rest: the difference, so that nothing is lost."""
    kept = _filled(leading(total, rank, TOLERANCE * scale).part(0, None), rank, spare)
    rest = total.addmm_(kept.up, kept.down, alpha=-1)
    return kept, rest, energy_share(kept, rest)


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
    rest = narrow(LowRank(up, down))
    lost = energy(rest)
    if math.sqrt(lost) <= TOLERANCE * scale:
        return kept, nothing(total), 0.0
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


def check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"an adapter's rank must be positive, not {rank}")
