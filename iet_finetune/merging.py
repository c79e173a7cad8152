"""The merge of iterative ensemble training: θ ← Σ_k n_k θ_k / Σ_k n_k, in float64, in the order of the clones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class WeightedSum:
    """A running Σ_k n_k θ_k over clones, of which only one is held at a time.

    With integer weights below 2^29 the product n_k θ_k of an fp32 tensor is exact in float64; so clones that are equal
    merge to themselves bit for bit. Tensors that are not floating point (counters) are taken from the first clone.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.total: float = 0
        self._dtypes: dict[str, torch.dtype] = {}

    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Adds `weight` times one clone; the sum lives on the host.

        Raises:
            ValueError: the weight is not positive, or names or shapes differ from the clones before.
        """
        if not weight > 0:
            raise ValueError(f"a clone's weight must be positive, not {weight}")
        if self.sums:
            _check_same_shapes(self.sums, tensors)
        for name, tensor in tensors.items():
            self._add_tensor(name, tensor.detach().cpu(), weight)
        self.total += weight

    def _add_tensor(self, name: str, tensor: Tensor, weight: float) -> None:
        first = name not in self.sums
        self._dtypes.setdefault(name, tensor.dtype)
        if not tensor.is_floating_point():
            if first:
                self.sums[name] = tensor.clone()
        elif first:
            self.sums[name] = tensor.to(torch.float64).mul(weight)
        else:
            self.sums[name].add_(tensor.to(torch.float64), alpha=weight)

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """Σ n_k θ_k / Σ n_k, divided once and rounded once to each tensor's own dtype."""
        if not self.sums:
            raise ValueError("nothing has been added to the sum")
        return {
            name: (total / self.total).to(self._dtypes[name]) if total.is_floating_point() else total.clone()
            for name, total in self.sums.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The float64 sums by name, for a checkpoint; `total` is the caller's to keep."""
        return dict(self.sums)

    def load_state_dict(self, sums: Mapping[str, Tensor], total: float, like: Mapping[str, Tensor]) -> None:
        """Takes up a saved sum; `like` gives the tensors' dtypes."""
        self.sums = dict(sums)
        self.total = total
        self._dtypes = {name: like[name].dtype for name in sums}


def merge_state_dicts(
    state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The weighted average of several models' state dicts; equal weights when none are given.

    Args:
        state_dicts: at least one, all with the same names and shapes.
        weights: one positive number each; they need not add up to 1. Give integers (numbers of images) to have equal
            models merge to themselves exactly.

    Raises:
        ValueError: no state dict, other number of weights, or different names or shapes.
    """
    weights = [1] * len(state_dicts) if weights is None else list(weights)
    if len(weights) != len(state_dicts):
        raise ValueError(f"{len(state_dicts)} state dicts need as many weights, not {len(weights)}")
    total = WeightedSum()
    for state_dict, weight in zip(state_dicts, weights, strict=True):
        total.add(state_dict, weight)
    return total.mean()


def _check_same_shapes(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    if ours.keys() != theirs.keys():
        odd = min(ours.keys() ^ theirs.keys())
        raise ValueError(f"the models do not have the same tensors: {odd} is missing in one of them")
    for name, tensor in theirs.items():
        if ours[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} in one model, {tuple(ours[name].shape)} before")
