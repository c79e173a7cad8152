"""The adapters of a round's clones, and how the ranks divide the merge of their layers among themselves."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..distributed.groups import Ranks
from ..ensemble.checkpoint import Checkpoint
from ..ensemble.host import HostMemory
from ..ensemble.pieces import Piece, state_piece, tensors_piece
from ..method.merging import Layout
from .adapters import Adapter
from .sharing import parts_of, portions
from .spectra import LowRank, Matrix

Tensors = Mapping[str, Tensor]


class CollectedAdapters:
    """The clones' adapters of a round, each on the rank that trained it until all are brought together to be merged.

    They are numbered in the order in which they are collected, which is that of their shards.

    Args:
        name: of the files in a checkpoint.
        live: tensors of the same names and shapes as a clone's.

    Attributes:
        weights: of the clones collected so far, on every rank.
        own: number -> tensors of those that this rank holds, on the host.
    """

    def __init__(self, name: str, adapter: Adapter, live: Tensors, ranks: Ranks, host: HostMemory) -> None:
        self._name, self._adapter, self._live, self._ranks, self._host = name, adapter, live, ranks, host
        self.weights: list[float] = []
        self.own: dict[int, Tensors] = {}

    def add(self, clone: Tensors | None, weights: Sequence[float]) -> None:
        """Collects a wave of clones: this rank's, and the weights of all."""
        rank = self._ranks.rank
        if clone is not None and weights[rank]:
            number = len(self.weights) + sum(weight > 0 for weight in weights[:rank])
            copy = {name: tensor.detach().to("cpu", copy=True) for name, tensor in clone.items()}
            self.own[number] = self._idle(copy)
        self.weights += [weight for weight in weights if weight]

    def _idle(self, clone: Tensors) -> Tensors:
        # They are merged on the host: no device copies them from here.
        return self._host.keep(clone) if self._host.in_files else clone

    def owned(self) -> list[str]:
        """The layers that this rank merges."""
        return list(self._adapter.layers)[self._ranks.rank :: self._ranks.size]

    def numbers(self, name: str) -> list[float]:
        """One number of each clone, on every rank."""
        gathered = self._ranks.all_gather_object([[number, clone[name].item()] for number, clone in self.own.items()])
        return [value for _, value in sorted(pair for own in gathered for pair in own)]

    def updates(self) -> Iterator[tuple[list[str], Iterator[tuple[str, list[LowRank]]]]]:
        """For each portion of the layers their names, and the updates of all clones of those that this rank merges.

        The clones are in their order. Every rank takes part.
        """
        together = self.own if self._ranks.size == 1 else self._brought_together()
        owned = set(self.owned())
        for names in portions(self._adapter.sizes, self._ranks.size):
            # One layer at a time: in float64 all together would be twice the adapters.
            yield names, ((name, self._of_layer(name, together)) for name in names if name in owned)

    def _of_layer(self, name: str, clones: Mapping[int, Tensors]) -> list[LowRank]:
        return [self._adapter.layers[name].update(clones[number]) for number in sorted(clones)]

    def _brought_together(self) -> dict[int, Tensors]:
        """Each rank sends every other what that one merges, one clone at a time."""
        layouts = [Layout(self._factors(rank)) for rank in range(self._ranks.size)]
        longest = max(layout.size for layout in layouts)
        gathered = self._ranks.all_gather_object(sorted(self.own))
        clones: dict[int, Tensors] = {}
        for turn in range(max(len(numbers) for numbers in gathered)):
            parts = torch.zeros(self._ranks.size, longest)
            if turn < len(gathered[self._ranks.rank]):
                own = self.own[gathered[self._ranks.rank][turn]]
                for layout, part in zip(layouts, parts, strict=True):
                    layout.read(own, 0, part)
            received = self._ranks.all_to_all(parts.view(-1).to(self._ranks.device)).cpu().view(parts.shape)
            for numbers, part in zip(gathered, received, strict=True):
                if turn < len(numbers):
                    clones[numbers[turn]] = layouts[self._ranks.rank].views(part)
        return clones

    def _factors(self, rank: int) -> Tensors:
        """What the layers that a rank merges have among a clone's tensors."""
        layers = list(self._adapter.layers.values())[rank :: self._ranks.size]
        return {name: self._live[name] for layer in layers for name in (layer.down, layer.up)}

    def first(self) -> Tensors:
        """All tensors of the first clone, on every rank. Every rank takes part."""
        source = next(
            rank for rank, numbers in enumerate(self._ranks.all_gather_object(sorted(self.own))) if 0 in numbers
        )
        layout = Layout(self._live)
        vector = torch.zeros(layout.size, device=self._ranks.device)
        if source == self._ranks.rank:
            layout.read(self.own[0], 0, vector)
        self._ranks.broadcast(vector, source)
        return layout.views(vector.cpu())

    def clear(self) -> None:
        """A new round begins."""
        self.weights, self.own = [], {}

    def pieces(self, start: str, so_far: str) -> dict[str, Piece]:
        """What this rank writes of them into a checkpoint."""
        pieces = {self._file(number): tensors_piece(start, clone) for number, clone in self.own.items()}
        if self.weights and self._ranks.is_main:
            pieces[f"{self._name}_weights.pt"] = state_piece(so_far, self.weights)
        return pieces

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores what any number of ranks wrote; which rank holds a clone does not matter."""
        self.clear()
        if checkpoint.has(f"{self._name}_weights.pt"):
            self.weights = checkpoint.state(f"{self._name}_weights.pt")
        for number in range(self._ranks.rank, len(self.weights), self._ranks.size):
            self.own[number] = self._idle(checkpoint.tensors(self._file(number)))

    def _file(self, number: int) -> str:
        return f"{self._name}_clone-{number:05d}.safetensors"


def matrices_piece(version: str, matrices: Mapping[str, Matrix]) -> Piece:
    """A piece holding named matrices, as factors or dense."""
    suffixes = {1: ("dense",), 2: ("up", "down")}
    parts = {name: parts_of(matrix) for name, matrix in matrices.items()}
    named = {f"{n}.{end}": t for n, p in parts.items() for end, t in zip(suffixes[len(p)], p, strict=True)}
    return tensors_piece(version, named)


def matrices_of(tensors: Tensors) -> dict[str, Matrix]:
    """What `matrices_piece` was made from."""
    names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    return {
        name: tensors[f"{name}.dense"]
        if f"{name}.dense" in tensors
        else LowRank(tensors[f"{name}.up"], tensors[f"{name}.down"])
        for name in names
    }
