"""The merges of LoRA clones on all ranks: exact, by the clones' updates, or by the mean of their matrices."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed.groups import Placement, Ranks
from ..ensemble.budget import Need
from ..ensemble.checkpoint import Checkpoint
from ..ensemble.host import HostMemory
from ..ensemble.merger import Merger, MergesClones
from ..ensemble.pieces import Piece, tensors_piece
from ..ensemble.trainable import Trainable
from .adapters import Adapter
from .clones import CollectedAdapters, matrices_of, matrices_piece
from .low_rank import align, merge_layer, weighted_sum
from .sharing import in_fp32, share_matrices
from .spectra import LowRank, Matrix, apart, energy

Tensors = Mapping[str, Tensor]
# A layer's optimizer state is kept if the merge moved its factors by less than this share of their length.
SAME_BASIS = 0.5


class _Settled(NamedTuple):
    """What a merge made of one layer.

    Attributes:
        kept: the adapter's matrices B and A, fp32.
        rest: what is left of the update beside it, fp32; None if nothing is.
        facts: gathered on all ranks: energies of the rest, of what is kept, of what a quantised layer cannot take and
            of the change, and whether the optimizer state starts over.
    """

    kept: LowRank
    rest: Matrix | None
    facts: dict[str, float]


class FactorMerger(Merger):
    """The mean of each matrix, A and B: FedIT (arXiv 2305.05644); with a frozen A, FFA-LoRA (arXiv 2403.12313).

    The product of two means is not the mean of the products, unless A is the same for all. Distances are those of the
    updates, by the size of the weights that they change.
    """

    def __init__(self, name: str, adapter: Adapter, tensors: Tensors, ranks: Ranks, host: HostMemory, **settings: Any):
        super().__init__(name, tensors, ranks, host, measured=False, **settings)
        self._adapter = adapter

    def collect(self, clone: Tensors | None, weights: Sequence[float]) -> float:
        """As `Merger.collect`."""
        moved = 0.0
        if clone is not None:
            moved = self._adapter.distance(self._adapter.updates(clone), self._adapter.updates(self.tensors))
        super().collect(clone, weights)
        self._moved = moved  # an only clone is its own mean from here on
        return moved

    def merge(self) -> float:
        """As `Merger.merge`."""
        if self._only_clone:
            return super().merge()
        before = self._adapter.updates(self.tensors)
        super().merge()
        return self._adapter.distance(self._adapter.updates(self.tensors), before)


class ExactMerger(MergesClones):
    """LoRA clones merged by their updates: remainder + B A ← remainder + Σ n_k B_k A_k / Σ n_k, layer by layer.

    B A is the best approximation of rank r, on which the clones of the next round train; the remainder holds the
    rest and is folded into the frozen weights. B A leaves the basis of its factors open: they are rotated to where
    they are nearest to the mean of the clones' factors (orthogonal Procrustes). Adam's state belongs to the numbers in
    the factors and cannot be rotated with them: the second moment of a sum does not follow from those of its terms. So
    a layer's state is kept only where the rotated factors are near that mean, and starts over elsewhere: as after the
    first merge, which balances an A that was drawn with a B that has only just left 0.

    The layers are divided among the ranks; all have the same bits afterwards, whatever their number.

    Args:
        name: of the files in a checkpoint.
        tensors: what the first round starts from.

    Attributes:
        tensors: the adapter's parameters at the start of the round, fp32 on the host; changed in place by `merge`.
        remainders: module's name -> remainder, fp32 on the host; replaced by `merge`.
        rebased: names of the parameters that the last merge put into another basis: their optimizer state is void.
        facts: numbers by name about the last merge, for the metrics.
        means: the mean update of each layer that this rank merged, for the moving average, until a clone begins anew.
    """

    def __init__(self, name: str, adapter: Adapter, tensors: Tensors, ranks: Ranks, host: HostMemory) -> None:
        self._name, self._adapter, self._ranks, self._host = name, adapter, ranks, host
        self._clones = CollectedAdapters(name, adapter, tensors, ranks, host)
        self.tensors = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
        self.remainders: dict[str, Matrix] = {}
        self.facts = {"remainder_share": 0.0}
        self.means: dict[str, LowRank] = {}

    @staticmethod
    def need(size: int, adapter: Adapter, placement: Placement) -> Need:
        """Bytes on each rank of adapters of `size` bytes: the merged one, the clones', and a dense remainder.

        Each clone's adapter is on one rank, and once more while they are brought together.
        """
        clones = placement.num_shards * size
        remainders = adapter.nbytes if placement.num_shards > 1 else 0
        return Need(
            host=size + remainders + -(-2 * clones // placement.num_ranks),
            checkpoint=size + remainders + (clones if placement.num_shards > 1 else 0),
        )

    @property
    def total(self) -> float:
        """Σ n_k of the clones that have been added in this round."""
        return sum(self._clones.weights)

    def load_into(self, trainable: Trainable) -> None:
        """Puts what all clones start from into the live adapter, and the remainders below it."""
        self.means = {}  # as wide as all clones' factors together
        self._adapter.fold_remainders(self.remainders)
        trainable.load(self.tensors)

    def collect(self, clone: Tensors | None, weights: Sequence[float]) -> float:
        """Collects one wave of clones; see `Merger.collect`.

        Returns:
            ‖ΔW_k − ΔW‖ / ‖W‖ of this rank's clone, W being the layers' weights before training.
        """
        self._clones.add(clone, weights)
        if clone is None:
            return 0.0
        return self._adapter.distance(self._adapter.updates(clone), self._adapter.updates(self.tensors))

    @torch.no_grad()
    def merge(self) -> float:
        """Merges what was collected; every rank takes part.

        Returns:
            ‖ΔW_new − ΔW‖ / ‖W‖; 0 if no clone was collected.
        """
        self.rebased, self.means = (), {}
        if not self._clones.weights:
            return 0.0
        facts: dict[str, dict[str, float]] = {}
        before = self.remainders
        self.remainders = {}
        # A new remainder is written over the old one where it fits there.
        self._adapter.forget_folded()
        for names, updates in self._clones.updates():
            settled = {name: self._settle(name, of_clones, before.get(name)) for name, of_clones in updates}
            facts |= self._gather(names, settled, before)
        self.rebased = [key for name in facts if facts[name]["rebased"] for key in self._keys(name)]
        lost, kept, moved = ([each[what] for each in facts.values()] for what in ("lost", "kept", "moved"))
        self.facts = {"remainder_share": sum(lost) / (sum(lost) + sum(kept)) if sum(lost) else 0.0}
        if self._adapter.quantised:
            gone = sum(each["cut"] for each in facts.values())
            self.facts["remainder_cut"] = gone / (sum(lost) + sum(kept)) if gone else 0.0
        self._clones.clear()
        return self._adapter.relative(moved)

    def _gather(
        self, layers: Sequence[str], settled: Mapping[str, _Settled], before: dict[str, Matrix]
    ) -> dict[str, dict[str, float]]:
        """Gives every rank what each made of some layers; returns the facts by layer.

        Args:
            before: the remainders of before the merge; loses those of these layers.
        """
        gathered = self._ranks.all_gather_object({name: layer.facts for name, layer in settled.items()})
        kept = share_matrices(self._ranks, layers, {name: layer.kept for name, layer in settled.items()})
        rests = {name: layer.rest for name, layer in settled.items() if layer.rest is not None}
        old = {name: before.pop(name) for name in layers if name in before}
        self.remainders |= self._host.keep(share_matrices(self._ranks, layers, rests), into=old)
        for name, factors in kept.items():
            for key, matrix in zip(self._keys(name), factors, strict=True):
                self.tensors[key].copy_(matrix.view_as(self.tensors[key]))
        facts = {name: each for of_rank in gathered for name, each in of_rank.items()}
        return {name: facts[name] for name in layers}

    def _keys(self, name: str) -> tuple[str, str]:
        layer = self._adapter.layers[name]
        return layer.up, layer.down

    def _settle(self, name: str, updates: list[LowRank], remainder: Matrix | None) -> _Settled:
        weights, layer = self._clones.weights, self._adapter.layers[name]
        merged = merge_layer(updates, weights, self._adapter.rank, remainder)
        self.means[name] = mean = weighted_sum(updates, weights)
        kept, rebased = merged.kept, False
        if not (torch.equal(kept.up, updates[0].up) and torch.equal(kept.down, updates[0].down)):
            like = LowRank(mean_of([u.up for u in updates], weights), mean_of([u.down for u in updates], weights))
            kept = align(kept, like)
            rebased = not _near(kept, like)
        rest = self._adapter.rounded_remainder(name, merged.rest)
        lost = energy(merged.rest)
        facts = {
            "lost": lost,
            "kept": kept.energy(),
            "cut": 0.0 if rest is merged.rest else max(lost - energy(rest), 0.0),
            "moved": apart(mean, layer.update(self.tensors)),
            "rebased": rebased,
        }
        is_empty = isinstance(rest, LowRank) and not rest.rank
        return _Settled(layer.factors(kept), None if is_empty else in_fp32(rest), facts)

    def pieces(self, start: str, so_far: str) -> dict[str, Piece]:
        """What this rank writes of it into a checkpoint; see `Merger.pieces`."""
        pieces = self._clones.pieces(start, so_far)
        if self._ranks.is_main:
            pieces[f"{self._name}.safetensors"] = tensors_piece(start, self.tensors)
            if self.remainders:
                pieces[f"{self._name}_remainders.safetensors"] = matrices_piece(start, self.remainders)
        return pieces

    def restore(self, checkpoint: Checkpoint, total: float) -> None:
        """Restores what `pieces` of any number of ranks wrote."""
        for name, tensor in checkpoint.tensors(f"{self._name}.safetensors").items():
            self.tensors[name].copy_(tensor)
        file = f"{self._name}_remainders.safetensors"
        self.remainders = self._host.keep(matrices_of(checkpoint.tensors(file)) if checkpoint.has(file) else {})
        self._clones.restore(checkpoint)

    def rest(self) -> None:
        """Releases resident pages of tensors mapped from `--offload_dir`."""
        self._host.rest(self.remainders, self._clones.own)


def mean_of(values: Sequence[Any], weights: Sequence[float]) -> Any:
    """Σ w_k x_k / Σ w_k."""
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _near(one: LowRank, other: LowRank) -> bool:
    """Whether two pairs of factors are near each other, by the length of the second."""
    moved = (one.up - other.up).square().sum() + (one.down - other.down).square().sum()
    return bool(moved < SAME_BASIS**2 * (other.up.square().sum() + other.down.square().sum()))
