"""A slice of a round's clones until the merge: their running sum, or all of them where the rule needs that."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..method.merging import BLOCK, CloneRule, SumRule, add_weighted
from .checkpoint import Checkpoint
from .host import HostMemory
from .pieces import Piece, slice_piece, state_piece


class Summed:
    """The running Σ n_k θ_k of a slice, in float64, added in the order of the clones.

    Args:
        rule: makes the next start of the sum.
        numbers: how many the slice has.
    """

    def __init__(self, rule: SumRule, numbers: int, host: HostMemory) -> None:
        self._rule = rule
        self._sum = host.empty((numbers,), torch.float64, copied=False)

    @property
    def tensors(self) -> list[Tensor]:
        """What rests on the host."""
        return [self._sum]

    def add(self, number: int, weight: float, start: int, numbers: Tensor) -> None:
        """Adds the numbers (n,) from `start` on of clone `number` of the round."""
        add_weighted(self._sum[start : start + len(numbers)], numbers, weight, first=number == 0)

    def merged(self, weights: Sequence[float], start: int, theta: Tensor) -> Tensor:
        """(n,) float64, what the rule makes of the numbers from `start` on; `theta` (n,) fp32 began the round."""
        return self._rule.merge(self._sum[start : start + len(theta)], sum(weights), theta)

    def pieces(
        self, name: str, weights: Sequence[float], end: str, first: int, start: str, so_far: str
    ) -> dict[str, Piece]:
        """What this rank writes into a checkpoint.

        Args:
            name: their files' names begin with it.
            end: those of this rank's slice end with it.
            first: the number that the slice begins with, of the whole vector.
            start, so_far: versions of the round's start, and of what has been collected.
        """
        return {f"{name}_sum-{end}": slice_piece(so_far, first, self._sum)}

    def restore(self, checkpoint: Checkpoint, name: str, first: int) -> list[float]:
        """Restores what any number of ranks wrote; returns the clones' weights where they were written."""
        checkpoint.read_slice(f"{name}_sum-", first, self._sum)
        return []


class Collected:
    """The same slice of every clone of a round, in the order of the clones; arguments as `Summed`."""

    def __init__(self, rule: CloneRule, numbers: int, host: HostMemory) -> None:
        self._rule, self._numbers, self._host = rule, numbers, host
        self.tensors: list[Tensor] = []  # used again in every round

    def add(self, number: int, weight: float, start: int, numbers: Tensor) -> None:
        """As `Summed.add`."""
        self._make_room(number + 1)
        self.tensors[number][start : start + len(numbers)].copy_(numbers)

    def merged(self, weights: Sequence[float], start: int, theta: Tensor) -> Tensor:
        """As `Summed.merged`."""
        merged = torch.empty(theta.shape, dtype=torch.float64)
        of_clones = torch.tensor(weights, dtype=torch.float64)
        for first in range(0, len(theta), BLOCK):
            part = theta[first : first + BLOCK]
            place = slice(start + first, start + first + len(part))
            clones = torch.stack([clone[place] for clone in self.tensors[: len(weights)]])
            merged[first : first + BLOCK] = self._rule.merge(clones, of_clones, part)
        return merged

    def pieces(
        self, name: str, weights: Sequence[float], end: str, first: int, start: str, so_far: str
    ) -> dict[str, Piece]:
        """As `Summed.pieces`."""
        clones = enumerate(self.tensors[: len(weights)])
        pieces = {f"{_file(name, number)}-{end}": slice_piece(start, first, clone) for number, clone in clones}
        return pieces if first else pieces | {f"{name}_weights.pt": state_piece(so_far, list(weights))}

    def restore(self, checkpoint: Checkpoint, name: str, first: int) -> list[float]:
        """As `Summed.restore`."""
        weights: list[float] = checkpoint.state(f"{name}_weights.pt")
        self._make_room(len(weights))
        for number in range(len(weights)):
            checkpoint.read_slice(f"{_file(name, number)}-", first, self.tensors[number])
        return weights

    def _make_room(self, clones: int) -> None:
        while len(self.tensors) < clones:
            self.tensors.append(self._host.empty((self._numbers,), torch.float32, copied=False))


def collection(rule: SumRule | CloneRule, numbers: int, host: HostMemory) -> Summed | Collected:
    """What a rule is given at the merge, of so many numbers."""
    return Summed(rule, numbers, host) if isinstance(rule, SumRule) else Collected(rule, numbers, host)


def collected_bytes(rule: SumRule | CloneRule, size: int, clones: int) -> int:
    """Bytes of a collection of so many clones of `size` bytes in fp32."""
    return 2 * size if isinstance(rule, SumRule) else clones * size


def _file(name: str, number: int) -> str:
    return f"{name}_clone-{number:05d}"
