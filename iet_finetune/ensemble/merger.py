"""What all clones start a round from, and the merge of what they made of it: summed by slices, one slice a rank."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from ..distributed.groups import Placement, Ranks
from ..method.merging import CloneRule, Layout, Mean, SumRule, outer_step
from .budget import Need
from .checkpoint import Checkpoint
from .collected import collected_bytes, collection
from .distance import ROW, Distance
from .host import HostMemory
from .pieces import Piece, slice_piece, tensors_piece
from .trainable import Trainable

# Numbers that leave a device, or a rank, at once: 256 MB together; within one CPU as many as stay in its cache.
BUCKET, ALONE = 1 << 26, 1 << 17
# An outer optimizer with learning rate 1 and without momentum changes nothing.
PLAIN = (1.0, 0.0)


class MergesClones(ABC):
    """A set of named tensors that all clones start a round from, and the merge of what they made of it.

    Every rank has one, and calls `collect` and `merge` in the same order as the others.

    Attributes:
        tensors: the value at the start of the round, on the host; changed in place by `merge`.
        rebased: names of the parameters that the last merge put into another basis: their optimizer state is void.
        facts: numbers by name about the last merge, for the metrics.
    """

    tensors: dict[str, Tensor]
    rebased: Sequence[str] = ()
    facts: Mapping[str, float] = MappingProxyType({})

    @property
    @abstractmethod
    def total(self) -> float:
        """Σ n_k of the clones that have been added in this round."""

    @abstractmethod
    def load_into(self, trainable: Trainable) -> None:
        """Puts what all clones start from into the live tensors."""

    @abstractmethod
    def collect(self, clone: Mapping[str, Tensor] | None, weights: Sequence[float]) -> float:
        """Collects one wave of clones.

        Args:
            clone: the live tensors of this rank's clone; None if it has none.
            weights: of each rank's clone in the merge; 0 for one that is left out.

        Returns:
            how far this rank's clone has moved from the start of the round, by the length of what it moves.
        """

    @abstractmethod
    def merge(self) -> float:
        """Makes the next round's start of the clones that were collected.

        Returns:
            how far the start has moved, by the length of what it moves; 0 if no clone was collected.
        """

    @abstractmethod
    def pieces(self, start: str, so_far: str) -> dict[str, Piece]:
        """What this rank writes of it into a checkpoint, by file name; rank 0 writes what all ranks hold.

        Args:
            start: version of the round's start.
            so_far: version of what has been collected.
        """

    @abstractmethod
    def restore(self, checkpoint: Checkpoint, total: float) -> None:
        """Restores what `pieces` of any number of ranks wrote."""

    @abstractmethod
    def rest(self) -> None:
        """Releases resident pages of tensors mapped from `--offload_dir`."""


class Merger(MergesClones):
    """One set of named tensors: its value at the start of the round, and the running Σ n_k θ_k of the clones.

    Every rank holds the whole value and one slice of the sum, in float64; it adds the clones' numbers in the order of
    the shards, divides once and rounds once. So the result has the same bits on any number of ranks. Tensors that are
    not floating point (counters) come from the first clone.

    Args:
        name: of the files in a checkpoint.
        tensors: what the first round starts from; on the device where the clones train.
        only_clone: whether there is but one clone, on one rank: it is its own mean, and no sum is kept.
        measured: whether `collect` and `merge` are asked how far the tensors have moved; otherwise they answer 0.
        outer: (lr, momentum) of the outer optimizer; (1, 0) takes what the rule made as it is.
        rule: what the clones become; the mean unless given.

    Attributes:
        tensors: the value at the start of the round, on the host; changed in place by `merge`.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        ranks: Ranks,
        host: HostMemory,
        *,
        only_clone: bool = False,
        measured: bool = True,
        outer: tuple[float, float] = PLAIN,
        rule: SumRule | CloneRule | None = None,
    ) -> None:
        self._name = name
        self._ranks = ranks
        self._host = host
        self._layout = Layout(tensors)
        self._device = next(iter(tensors.values())).device if ranks.size == 1 else ranks.device
        self._measured = measured
        self._outer = outer if outer != PLAIN else None
        rule = rule or Mean()
        self._only_clone = only_clone and _leaves_one_alone(rule, outer)
        self._slice = slice_size(self._layout.size, ranks.size)
        alone = ranks.size == 1 and self._device.type == "cpu"
        self._chunk = min(self._slice, ALONE if alone else max(BUCKET // ranks.size // ROW, 1) * ROW)
        self._value = host.empty((self._slice * ranks.size,), torch.float32)
        self.tensors = self._layout.views(self._value)
        counters = {n: t.detach().to("cpu", copy=True) for n, t in tensors.items() if n not in self.tensors}
        self.tensors |= counters
        self._counters = {name: counter.clone() for name, counter in counters.items()}
        for start in range(0, len(self._value), ALONE):
            self._layout.read(tensors, start, self._value[start : start + ALONE])
        self._collected = None if self._only_clone else collection(rule, self._slice, host)
        self._velocity: Tensor | None = None
        if self._outer and self._outer[1]:
            self._velocity = host.empty((self._slice,), torch.float32, copied=False).zero_()
        self._weights: list[float] = []
        self._moved = 0.0
        # ‖θ‖² of the round's start, from the first time it is asked for to the merge.
        self._norm: float | None = None
        self.rest()

    @classmethod
    def need(
        cls,
        size: int,
        placement: Placement,
        outer: tuple[float, float] = PLAIN,
        rule: SumRule | CloneRule | None = None,
    ) -> Need:
        """Bytes on each rank of fp32 tensors of `size` bytes: their value, and slices of what is collected."""
        rule = rule or Mean()
        velocity = size if outer[1] else 0
        collected = collected_bytes(rule, size, placement.num_shards)
        held = 0 if placement.only_clone and _leaves_one_alone(rule, outer) else collected
        return Need(
            host=size + -(-(held + velocity) // placement.num_ranks),
            checkpoint=size + velocity + (collected if placement.num_shards > 1 else 0),
        )

    def load_into(self, trainable: Trainable) -> None:
        """Puts what all clones start from into the live tensors."""
        trainable.load(self.tensors)

    # --- the sum -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, clone: Mapping[str, Tensor] | None, weights: Sequence[float]) -> float:
        """As `MergesClones.collect`; returns ‖θ_k − θ‖ / ‖θ‖ of this rank's clone, θ being the start of the round."""
        moved = Distance(self._norm)
        if not any(weights):
            return 0.0
        if not self._weights:
            self._take_counters(clone, next(rank for rank, weight in enumerate(weights) if weight))
        self._ranks.barrier()
        buffer = torch.empty(self._ranks.size * self._chunk, dtype=torch.float32, device=self._device)
        for start, stop in self._chunks():
            parts = buffer[: self._ranks.size * (stop - start)]
            if clone is not None:
                self._read_clone(clone, start, stop, parts, moved)
            self._add(start, self._ranks.all_to_all(parts, barrier=False), weights)
        self._weights += [weight for weight in weights if weight]
        self._moved = moved.relative
        if self._measured and clone is not None:
            self._norm = moved.norm
        self.rest()
        return self._moved

    def _read_clone(self, clone: Mapping[str, Tensor], start: int, stop: int, parts: Tensor, moved: Distance) -> None:
        for rank, part in enumerate(self._by_rank(parts)):
            first = rank * self._slice + start
            self._layout.read(clone, first, part)
            value = self._value[first : first + len(part)]
            if self._measured:
                moved.add(part, value.to(part.device, non_blocking=True))
            if self._only_clone:
                value.copy_(part)

    def _add(self, start: int, parts: Tensor, weights: Sequence[float]) -> None:
        if self._collected is None:
            return
        of_clones = zip(self._by_rank(self._host.fetched(parts)), weights, strict=True)
        for number, (part, weight) in enumerate(pair for pair in of_clones if pair[1]):
            self._collected.add(len(self._weights) + number, weight, start, part)

    def _take_counters(self, clone: Mapping[str, Tensor] | None, source: int) -> None:
        for name, counter in self._counters.items():
            buffer = counter.to(self._device)
            if clone is not None and self._ranks.rank == source:
                buffer = clone[name].detach().to(self._device, copy=True)
            self._ranks.broadcast(buffer, source)
            counter.copy_(buffer)

    # --- the merge ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> float:
        """θ ← Σ n_k θ_k / Σ n_k, or what another rule and the outer optimizer make of it; every rank takes part.

        Returns:
            ‖θ_new − θ‖ / ‖θ‖; 0 if no clone was collected.
        """
        if not self._weights:
            return 0.0
        moved = Distance(self._norm)
        self._ranks.barrier()
        for start, stop in self._chunks() if self._collected is not None else ():
            part = self._merged(start, stop).to(self._device)
            merged = self._host.fetched(self._ranks.all_gather(part, barrier=False))
            self._take_over(start, self._by_rank(merged), moved)
        for name, counter in self._counters.items():
            self.tensors[name].copy_(counter)
        self._weights, self._norm = [], None
        self.rest()
        return self._moved if self._only_clone else moved.relative

    def _merged(self, start: int, stop: int) -> Tensor:
        assert self._collected is not None
        first = self._ranks.rank * self._slice
        theta = self._value[first + start : first + stop]
        merged = self._collected.merged(self._weights, start, theta)
        if self._outer is None:
            return merged.to(torch.float32)
        velocity = self._velocity[start:stop] if self._velocity is not None else None
        return outer_step(theta, merged, velocity, *self._outer)

    def _take_over(self, start: int, parts: Sequence[Tensor], moved: Distance) -> None:
        for rank, part in enumerate(parts):
            first = rank * self._slice + start
            value = self._value[first : first + len(part)]
            if self._measured:
                moved.add(part, value)
            value.copy_(part)

    def _by_rank(self, parts: Tensor) -> tuple[Tensor, ...]:
        return parts.view(self._ranks.size, -1).unbind()

    def _chunks(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self._slice, self._chunk):
            yield start, min(start + self._chunk, self._slice)

    def rest(self) -> None:
        """Releases resident pages of tensors mapped from `--offload_dir`."""
        collected = self._collected.tensors if self._collected is not None else []
        self._host.rest(self._value, *collected, *([] if self._velocity is None else [self._velocity]))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def total(self) -> float:
        """Σ n_k of the clones that have been added in this round."""
        return sum(self._weights)

    def pieces(self, start: str, so_far: str) -> dict[str, Piece]:
        """As `MergesClones.pieces`."""
        pieces: dict[str, Piece] = {}
        if self._ranks.is_main:
            pieces[f"{self._name}.safetensors"] = tensors_piece(start, self.tensors)
            if self._counters and self._weights:
                pieces[f"{self._name}_counters.safetensors"] = tensors_piece(so_far, self._counters)
        first = self._ranks.rank * self._slice
        end = f"{self._ranks.rank + 1:05d}-of-{self._ranks.size:05d}.safetensors"
        if first >= self._layout.size:
            return pieces
        if self._weights and self._collected is not None:
            pieces |= self._collected.pieces(self._name, self._weights, end, first, start, so_far)
        if self._velocity is not None:
            pieces[f"{self._name}_velocity-{end}"] = slice_piece(start, first, self._velocity)
        return pieces

    def restore(self, checkpoint: Checkpoint, total: float) -> None:
        """Restores what `pieces` of any number of ranks wrote."""
        for name, tensor in checkpoint.tensors(f"{self._name}.safetensors").items():
            self.tensors[name].copy_(tensor)
        first = self._ranks.rank * self._slice
        self._weights = [total] if total else []  # of sums only their total is known, which is enough
        if total and self._collected is not None:
            self._weights = self._collected.restore(checkpoint, self._name, first) or self._weights
        if total and self._counters:
            self._counters = checkpoint.tensors(f"{self._name}_counters.safetensors")
        if self._velocity is not None:
            checkpoint.read_slice(f"{self._name}_velocity-", first, self._velocity)
        self._norm = None
        self.rest()


def _leaves_one_alone(rule: SumRule | CloneRule, outer: tuple[float, float]) -> bool:
    """Whether a single clone is what it merges to."""
    return isinstance(rule, Mean) and outer == PLAIN


def slice_size(numbers: int, ranks: int) -> int:
    """How many numbers each rank's slice has: whole rows, and together at least all."""
    return -(-numbers // (ranks * ROW)) * ROW
