"""Robust deviations: how far values are below what is usual, and where that tells most."""

import torch
from torch import Tensor

# A median absolute deviation is so much of a standard deviation, if values are normal.
_ROBUST = 1.4826
# The upper end of some values.
UPPER = 0.25


def deviations_below(values: Tensor, usual: Tensor) -> Tensor:
    """By how many robust deviations of the usual values each value is below their median; NaN is no usual value."""
    median = _median(usual)
    deviation = _ROBUST * _median((usual - median).abs())
    return (median - values) / deviation.clamp(min=1e-6)


def separation(values: Tensor, usual: Tensor) -> Tensor:
    """How well values that have fallen are told from usual ones, by kind of score, though nobody says which have.

    With z the robust deviations below the median of the usual values, of the one and of the other,

        C = mean of the highest quarter of z_values - mean of the highest quarter of z_usual

    Few are memorized at first, so that means of all would hide them; and a kind of score whose usual values have
    heavy tails is not preferred for these.

    Args:
        values: (n, J).
        usual: (H, J).

    Returns:
        (J,) of C; the higher, the better.
    """
    pairs = zip(values.unbind(1), usual.unbind(1), strict=True)
    told = [_upper(deviations_below(one, other)) - _upper(deviations_below(other, other)) for one, other in pairs]
    return torch.stack(told)


def _upper(values: Tensor) -> Tensor:
    return values.topk(max(1, int(UPPER * len(values)))).values.mean()


def _median(values: Tensor) -> Tensor:
    """(1,) the lower median of what is not NaN, as `torch.nanmedian`, which on a GPU waits for the device."""
    middle = ((~values.isnan()).sum(dim=0, keepdim=True) - 1).clamp(min=0) // 2
    return values.sort().values.gather(0, middle)
