"""The merge of iterative ensemble training: θ ← Σ_k n_k θ_k / Σ_k n_k, in float64, in the order of the clones.

Other merge rules replace `Mean`: a `SumRule` if the sum is enough, else a `CloneRule`.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Elements processed at once: a block of fp32 and one of float64 fit in a processor's cache.
BLOCK = 1 << 17


def add_weighted(total: Tensor, values: Tensor, weight: float, *, first: bool = False) -> None:
    """total ← total + weight · values, or weight · values for the first; block by block, without a large temporary.

    Args:
        total: (n,) float64, contiguous.
        values: (n,) of any floating dtype, contiguous.
    """
    for start in range(0, values.numel(), BLOCK):
        block, sums = values[start : start + BLOCK], total[start : start + BLOCK]
        if first:
            sums.copy_(block).mul_(weight)
        else:
            sums.add_(block, alpha=weight)


class SumRule(ABC):
    """A merge rule that needs only the sum of the clones, which arrive one at a time.

    It works elementwise: it may be given any slice of the parameters, and each result depends on that element alone.
    So it gives the same bits on any number of ranks.

    Args:
        config: the values of the rule's flags, if it has any.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config

    @abstractmethod
    def merge(self, total: Tensor, weight: float, start: Tensor) -> Tensor:
        """What the next round starts from.

        Args:
            total: (n,) float64, Σ_k n_k θ_k over the clones that trained in this round; not to be changed.
            weight: Σ_k n_k.
            start: (n,) fp32, the θ that this round started from; not to be changed.

        Returns:
            (n,) float64, rounded to fp32 afterwards.
        """


class CloneRule(ABC):
    """A merge rule that needs all clones at once, which wait in host memory or `--offload_dir` until the merge.

    It works elementwise, and is constructed, as a `SumRule`.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config

    @abstractmethod
    def merge(self, clones: Tensor, weights: Tensor, start: Tensor) -> Tensor:
        """What the next round starts from.

        Args:
            clones: (K, n) fp32, θ_k of the clones that trained in this round, in the order of their shards.
            weights: (K,) float64, n_k.
            start: (n,) fp32, the θ that this round started from; not to be changed.

        Returns:
            (n,) of a floating dtype, rounded to fp32 afterwards.
        """


class Mean(SumRule):
    """θ ← Σ_k n_k θ_k / Σ_k n_k."""

    def merge(self, total: Tensor, weight: float, start: Tensor) -> Tensor:
        """As `SumRule.merge`; divided once."""
        return total / weight


def outer_step(start: Tensor, mean: Tensor, velocity: Tensor | None, lr: float, momentum: float) -> Tensor:
    """One step of SGD with Nesterov momentum on the pseudo-gradient g = θ − mean, as in DiLoCo (arXiv 2311.08105).

    v ← μ v + g and θ ← θ − lr · (g + μ v); with lr 1 and momentum 0 this is the mean. In float64, every product and
    sum rounded by itself, so that a number's bits do not depend on where in a tensor it stands.

    Args:
        start: (n,) fp32, θ at the start of the round.
        mean: (n,) float64, the weighted mean of the clones.
        velocity: (n,) fp32, v, changed in place; None with momentum 0.

    Returns:
        (n,) fp32.
    """
    gradient = start.to(torch.float64).sub_(mean)
    if velocity is not None:
        velocity.copy_(velocity.to(torch.float64).mul_(momentum).add_(gradient))
        gradient.add_(velocity.to(torch.float64).mul_(momentum))
    return start.to(torch.float64).sub_(gradient.mul_(lr)).to(torch.float32)


class Layout:
    """Named fp32 tensors seen as one vector of numbers, in their order; other tensors have no place in it.

    Args:
        tensors: the floating-point ones among them are fp32.

    Attributes:
        shapes: of the tensors that have a place.
        size: how many numbers they hold.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        odd = [name for name, tensor in floats.items() if tensor.dtype != torch.float32]
        if odd:
            raise ValueError(f"{odd[0]} is {floats[odd[0]].dtype}; what is merged must be fp32")
        self.shapes = {name: tensor.shape for name, tensor in floats.items()}
        # Numbers stand in the vector as they do in memory, so that tensors with the channels last are not copied.
        self._orders = {name: _order_in_memory(tensor) for name, tensor in floats.items()}
        self._names = list(floats)
        self._starts: list[int] = []
        self.size = 0
        for tensor in floats.values():
            self._starts.append(self.size)
            self.size += tensor.numel()

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """The named tensors as views of a vector of at least `size` numbers."""
        places = zip(self._names, self._starts, self.shapes.values(), strict=True)
        return {
            name: _unflattened(vector[start : start + shape.numel()], shape, self._orders[name])
            for name, start, shape in places
        }

    @torch.no_grad()
    def read(self, tensors: Mapping[str, Tensor], start: int, out: Tensor) -> None:
        """Copies the numbers from `start` on of the named tensors into `out` (n,); beyond the end they are 0."""
        stop = max(min(start + out.numel(), self.size), start)
        out[stop - start :].zero_()
        first, last = bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop)
        if stop == start:
            return
        parts = [_flattened(tensors[name], self._orders[name]) for name in self._names[first:last]]
        parts[-1] = parts[-1][: stop - self._starts[last - 1]]
        parts[0] = parts[0][start - self._starts[first] :]
        # All at once: for the small tensors of a network a copy takes less than its call.
        torch._foreach_copy_(out[: stop - start].split([part.numel() for part in parts]), parts)


def _order_in_memory(tensor: Tensor) -> list[int] | None:
    """The dimensions from the outermost to the innermost, such as 0, 2, 3, 1; None where that is their own order."""
    strides = tensor.stride()
    return None if tensor.is_contiguous() else sorted(range(tensor.dim()), key=lambda dim: -strides[dim])


def _flattened(tensor: Tensor, order: list[int] | None) -> Tensor:
    """The tensor's numbers in this order; a view where they lie so."""
    return tensor.reshape(-1) if order is None else tensor.permute(order).reshape(-1)


def _unflattened(flat: Tensor, shape: torch.Size, order: list[int] | None) -> Tensor:
    """A tensor of this shape whose dimensions lie in the memory of `flat` in this order."""
    if order is None:
        return flat.view(shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[dim] for dim in order]).permute(inverse)


class WeightedSum:
    """A running Σ_k n_k θ_k over clones, only one of which is held at a time.

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
            return
        if first:
            self.sums[name] = torch.empty(tensor.shape, dtype=torch.float64)
        add_weighted(self.sums[name].view(-1), tensor.reshape(-1), weight, first=first)

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
        """The float64 sums by name, for a checkpoint; the caller keeps `total`."""
        return dict(self.sums)

    def load_state_dict(self, sums: Mapping[str, Tensor], total: float, like: Mapping[str, Tensor]) -> None:
        """Restores a saved sum; `like` gives the tensors' dtypes."""
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
