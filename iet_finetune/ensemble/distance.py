"""How far apart two long vectors are, summed so that the parts they come in change no bit."""

import math

import torch
from torch import Tensor

# Distances are summed by rows of so many numbers, and slices end at rows: the same rows on any number of ranks.
ROW = 1 << 10


class Distance:
    """‖a − b‖ / ‖b‖ over the parts of two vectors, the same number whatever the parts and their order.

    Args:
        norm: ‖b‖² where it is known from an earlier measurement; it is not computed again then.
    """

    def __init__(self, norm: float | None = None) -> None:
        self._moved: list[float] = []
        self._parts_of_norm: list[float] = []
        self._norm = norm

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """One part: (n,) fp32, n a multiple of 1024."""
        rows = [_sums_of_squares(ours - theirs)]
        if self._norm is None:
            rows.append(_sums_of_squares(theirs.clone()))
        # Both at once: reading waits for the device.
        numbers = torch.cat(rows).tolist() if len(rows) > 1 else rows[0].tolist()
        self._moved += numbers[: len(rows[0])]
        self._parts_of_norm += numbers[len(rows[0]) :]

    @property
    def norm(self) -> float:
        """‖b‖², of what was added so far where it was not given."""
        return math.fsum(self._parts_of_norm) if self._norm is None else self._norm

    @property
    def relative(self) -> float:
        """The distance so far; 0 if nothing was added or everything is 0."""
        norm = self.norm
        return math.sqrt(math.fsum(self._moved) / norm) if norm else 0.0


def _sums_of_squares(numbers: Tensor) -> Tensor:
    """Σ x² of each row of a part, which is overwritten: a second large temporary would cost more than the sums."""
    return numbers.view(-1, ROW).square_().sum(dim=1)
