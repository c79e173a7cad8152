"""What each rank makes of its layers in a merge, given to all ranks one portion of the layers after the other."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..distributed.groups import Ranks
from .spectra import LowRank, Matrix

# Bytes of a portion, as many as other merges send at once.
PORTION = 1 << 28


def portions(sizes: Mapping[str, int], num_ranks: int) -> Iterator[list[str]]:
    """Layers in their order, in parts of at most `PORTION` bytes, but with one layer for each rank at least.

    What a merge makes of one portion is at rest before the next begins; no result depends on how they are cut.

    Args:
        sizes: layer -> bytes of its weight in fp32, which its remainder has at most.
    """
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if len(names) >= num_ranks and filled + size > PORTION:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    if names:
        yield names


def share_matrices(ranks: Ranks, layers: Sequence[str], own: Mapping[str, Matrix]) -> dict[str, Matrix]:
    """Gives every rank the matrices of all ranks, in fp32 on the host, in the order of the layers.

    Args:
        layers: the names of all layers, the same on every rank; one for which no rank has a matrix is left out.
        own: those of this rank.
    """
    rounded = {name: in_fp32(matrix) for name, matrix in own.items()}
    if ranks.size == 1:
        return {name: rounded[name] for name in layers if name in rounded}
    shapes_here = {name: [tuple(part.shape) for part in parts_of(matrix)] for name, matrix in rounded.items()}
    gathered = ranks.all_gather_object(shapes_here)
    sources = {name: (rank, shapes) for rank, found in enumerate(gathered) for name, shapes in found.items()}
    return {name: _broadcast(ranks, rounded.get(name), *sources[name]) for name in layers if name in sources}


def _broadcast(ranks: Ranks, matrix: Matrix | None, source: int, shapes: Sequence[tuple[int, ...]]) -> Matrix:
    sizes = [torch.Size(shape).numel() for shape in shapes]
    vector = torch.empty(sum(sizes), device=ranks.device)
    if matrix is not None:
        vector.copy_(torch.cat([part.reshape(-1) for part in parts_of(matrix)]))
    ranks.broadcast(vector, source, barrier=False)
    parts = [part.view(shape) for part, shape in zip(vector.cpu().split(sizes), shapes, strict=True)]
    return parts[0] if len(parts) == 1 else LowRank(*parts)


def parts_of(matrix: Matrix) -> tuple[Tensor, ...]:
    """A dense matrix alone, or both factors."""
    return (matrix,) if isinstance(matrix, Tensor) else (matrix.up, matrix.down)


def in_fp32(matrix: Matrix) -> Matrix:
    """The matrix rounded once, dense or as factors as before; itself if it is fp32."""
    parts = [part.to(torch.float32) for part in parts_of(matrix)]
    return parts[0] if isinstance(matrix, Tensor) else LowRank(*parts)
