"""The merge of the moving averages of LoRA clones that are merged exactly."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..distributed.groups import Ranks
from ..ensemble.checkpoint import Checkpoint
from ..ensemble.ema import START_SHARE
from ..ensemble.host import HostMemory
from ..ensemble.merger import MergesClones
from ..ensemble.pieces import Piece, tensors_piece
from ..ensemble.trainable import Trainable
from .adapters import Adapter
from .clones import CollectedAdapters, matrices_of, matrices_piece
from .low_rank import combine, weighted_sum
from .merger import ExactMerger, mean_of
from .sharing import in_fp32, share_matrices
from .spectra import Matrix

Tensors = Mapping[str, Tensor]


class ExactAverageMerger(MergesClones):
    """The moving averages of LoRA clones, merged by their updates.

    A clone's average is remainder + s C + B̄ Ā: its factors B̄ and Ā follow the adapter's from the start of the round
    on, and s C is what is left of how far the average was from the denoiser then, s being the product of the decays
    since. A merge puts the adapter into another basis, in which old factors mean nothing; so the merged average starts
    at the merged adapter's factors, with s = 1 and C ← s C + mean of B̄_k Ā_k − mean of B_k A_k. A single clone's
    average goes on as it is.

    Args:
        name: of the files in a checkpoint.
        tensors: the live average, with its `START_SHARE`.
        main: merges the clones themselves, always before this.

    Attributes:
        tensors: the average's factors and s at the start of the round, fp32 on the host; changed in place by `merge`.
    """

    def __init__(
        self, name: str, adapter: Adapter, tensors: Tensors, main: ExactMerger, ranks: Ranks, host: HostMemory
    ) -> None:
        self._name, self._adapter, self._main, self._ranks, self._host = name, adapter, main, ranks, host
        self._clones = CollectedAdapters(name, adapter, tensors, ranks, host)
        self.tensors = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
        self._away: dict[str, Matrix] = {}

    @property
    def total(self) -> float:
        """Σ n_k of the averages that have been added in this round."""
        return sum(self._clones.weights)

    @property
    def remainders(self) -> Mapping[str, Matrix]:
        """Module's name -> remainder + s C, float64, added up whenever it is asked for."""
        return _Sums(self._main.remainders, self.tensors[START_SHARE].item(), self._away)

    def load_into(self, trainable: Trainable) -> None:
        """Puts the average into the live adapter and the weights below it."""
        self._adapter.fold_remainders(self.remainders)
        trainable.load({name: tensor for name, tensor in self.tensors.items() if name != START_SHARE})

    def collect(self, clone: Tensors | None, weights: Sequence[float]) -> float:
        """Collects one wave of averages; see `Merger.collect`. Distances are not measured."""
        self._clones.add(clone, weights)
        return 0.0

    @torch.no_grad()
    def merge(self) -> float:
        """Merges what was collected; every rank takes part. The change is not measured."""
        if len(self._clones.weights) == 1:
            values: Tensors = self._clones.first()
        elif self._clones.weights:
            self._take_apart()
            values = {**self._main.tensors, START_SHARE: torch.ones(())}
        else:
            return 0.0
        for name, value in values.items():
            self.tensors[name].copy_(value)
        self._clones.clear()
        return 0.0

    def _take_apart(self) -> None:
        weights = self._clones.weights
        share = float(mean_of(self._clones.numbers(START_SHARE), weights))
        before, self._away = self._away, {}
        for names, updates in self._clones.updates():
            own: dict[str, Matrix] = {}
            for name, of_clones in updates:
                terms: list[tuple[float, Matrix]] = [(1.0, weighted_sum(of_clones, weights))]
                terms.append((-1.0, self._main.means[name]))
                if name in before:
                    terms.append((share, before[name]))
                away = combine(terms)
                if isinstance(away, Tensor) or away.rank:
                    own[name] = in_fp32(away)
            old = {name: before.pop(name) for name in names if name in before}
            self._away |= self._host.keep(share_matrices(self._ranks, names, own), into=old)

    def pieces(self, start: str, so_far: str) -> dict[str, Piece]:
        """What this rank writes of it into a checkpoint; see `Merger.pieces`."""
        pieces = self._clones.pieces(start, so_far)
        if self._ranks.is_main:
            pieces[f"{self._name}.safetensors"] = tensors_piece(start, self.tensors)
            if self._away:
                pieces[f"{self._name}_away.safetensors"] = matrices_piece(start, self._away)
        return pieces

    def restore(self, checkpoint: Checkpoint, total: float) -> None:
        """Restores what `pieces` of any number of ranks wrote."""
        for name, tensor in checkpoint.tensors(f"{self._name}.safetensors").items():
            self.tensors[name].copy_(tensor)
        file = f"{self._name}_away.safetensors"
        self._away = self._host.keep(matrices_of(checkpoint.tensors(file)) if checkpoint.has(file) else {})
        self._clones.restore(checkpoint)

    def rest(self) -> None:
        """Releases resident pages of tensors mapped from `--offload_dir`."""
        self._host.rest(self._away, self._clones.own)


class _Sums(Mapping[str, Matrix]):
    """remainder + s C by layer; all at once would take twice the memory of what they are made of."""

    def __init__(self, remainders: Mapping[str, Matrix], share: float, away: Mapping[str, Matrix]) -> None:
        self._remainders, self._share, self._away = remainders, share, away

    def __getitem__(self, name: str) -> Matrix:
        terms = [
            (factor, of[name]) for factor, of in ((1.0, self._remainders), (self._share, self._away)) if name in of
        ]
        if not terms:
            raise KeyError(name)
        return combine(terms)

    def __contains__(self, name: object) -> bool:
        return name in self._remainders or name in self._away

    def __iter__(self) -> Iterator[str]:
        return iter({**self._remainders, **self._away})

    def __len__(self) -> int:
        return len(self._remainders.keys() | self._away.keys())
