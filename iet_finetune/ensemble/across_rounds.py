"""What becomes of the optimizer's state between a clone's rounds: `--optimizer_across_rounds`, one policy a class."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..distributed.groups import Placement, Ranks
from ..errors import UserError
from .budget import Need
from .checkpoint import Checkpoint
from .clone import Clone
from .host import HostMemory
from .merger import Merger
from .optimizers import (
    fresh_optimizer_state,
    load_optimizer_state,
    named_state,
    optimizer_state,
    parameter_of,
    state_by_parameter,
    with_counts_apart,
)
from .pieces import Piece, state_piece


class Reset:
    """The optimizer begins every round anew.

    The other policies derive from it: whatever the policy, a clone in the middle of its round has a state, which is
    part of a checkpoint.

    Args:
        optimizer: works on the live clone's parameters.
        host: where the state of idle clones is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, ranks: Ranks, placement: Placement, host: HostMemory) -> None:
        self._optimizer = optimizer
        self._host = host

    @classmethod
    def need(cls, state: int, placement: Placement, rank: int) -> Need:
        """Bytes on this rank, where the state of one clone takes `state` bytes."""
        return Need(device=state, checkpoint=placement.at_once * state)

    def begin_round(self, clone: Clone) -> None:
        """Gives the optimizer the state with which a clone begins its round."""
        load_optimizer_state(self._optimizer, None)

    def resume(self, clone: Clone) -> None:
        """Gives the optimizer the state of a clone that a checkpoint caught in the middle of its round."""
        load_optimizer_state(self._optimizer, clone.optimizer_state)
        clone.optimizer_state = None

    def collect(self, clone: Clone | None, weights: Sequence[float]) -> None:
        """Takes the state from this rank's clone at the end of its round; every rank takes part.

        Args:
            clone: None if this rank has none in the wave.
            weights: of each rank's clone in the merge; 0 for one that is left out.
        """
        self.clear()

    def merge(self, clones: Iterable[Clone], rebased: Collection[int]) -> None:
        """Ends a round; every rank takes part.

        Args:
            rebased: numbers of the parameters that the merge has put into another basis: their state starts over.
        """

    def clear(self) -> None:
        """Drops the live state."""
        self._optimizer.state.clear()

    def rest(self, clones: Iterable[Clone]) -> None:
        """Releases resident pages of what is mapped from `--offload_dir`."""
        self._host.rest(*(clone.optimizer_state for clone in clones if clone.optimizer_state))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def pieces(self, start: str, so_far: str) -> dict[str, Piece]:
        """What this rank writes of what all clones share; see `MergesClones.pieces`."""
        return {}

    def clone_pieces(self, clone: Clone, *, live: bool) -> dict[str, Piece]:
        """What this rank writes of one clone's state."""
        state = optimizer_state(self._optimizer) if live else clone.optimizer_state
        if not state:
            return {}
        # Some parameters' state may have been dropped since this step.
        piece = state_piece(f"step {clone.step}, {len(state)} of them", state)

        def write(path: Path) -> None:
            piece.write(path)
            # Otherwise the state of all clones, read from their files one after the other, would end up in memory.
            self._host.rest(state)

        return {_file(clone): Piece(piece.version, write)}

    def restore(self, checkpoint: Checkpoint, total: float) -> None:
        """Restores what all clones share; see `MergesClones.restore`."""

    def restore_clone(self, clone: Clone, checkpoint: Checkpoint, *, midway: bool) -> None:
        """Restores the state of one of this rank's clones.

        Args:
            midway: whether the checkpoint caught it in the middle of its round.
        """
        # Ignore the state of idle clones left by a run that used `keep`.
        if midway:
            self._read(clone, checkpoint)

    def _read(self, clone: Clone, checkpoint: Checkpoint) -> None:
        if checkpoint.has(_file(clone)):
            clone.optimizer_state = self._host.keep(checkpoint.state(_file(clone)))
            self._host.rest(clone.optimizer_state)


class Keep(Reset):
    """Each clone goes on with its own state."""

    def __init__(self, optimizer: torch.optim.Optimizer, ranks: Ranks, placement: Placement, host: HostMemory) -> None:
        super().__init__(optimizer, ranks, placement, host)
        # What a clone's state was written to before, so that a file does not have to be made anew each round.
        self._buffers: dict[int, Any] = {}

    @classmethod
    def need(cls, state: int, placement: Placement, rank: int) -> Need:
        """As `Reset.need`."""
        clones = len(placement.shards_of(rank))
        return Need(device=state, host=clones * state, shared=state, checkpoint=placement.num_shards * state)

    def begin_round(self, clone: Clone) -> None:
        """As `Reset.begin_round`."""
        self.resume(clone)

    def collect(self, clone: Clone | None, weights: Sequence[float]) -> None:
        """As `Reset.collect`. In memory the state changes owner; from a device or to files it is copied."""
        if clone is not None:
            state: Any = optimizer_state(self._optimizer)
            state = with_counts_apart(state) if self._host.in_files else state
            kept = self._host.keep(state, into=self._buffers.get(clone.shard))
            clone.optimizer_state = self._buffers[clone.shard] = kept
        self.clear()

    def merge(self, clones: Iterable[Clone], rebased: Collection[int]) -> None:
        """As `Reset.merge`."""
        for clone in clones if rebased else ():
            if clone.optimizer_state:
                clone.optimizer_state = {n: state for n, state in clone.optimizer_state.items() if n not in rebased}

    def restore_clone(self, clone: Clone, checkpoint: Checkpoint, *, midway: bool) -> None:
        """As `Reset.restore_clone`."""
        self._read(clone, checkpoint)
        if clone.optimizer_state:
            self._buffers[clone.shard] = clone.optimizer_state


class Average(Reset):
    """Every clone begins a round with the average of all clones' states."""

    _NAME = "moments"  # of its files in a checkpoint

    def __init__(self, optimizer: torch.optim.Optimizer, ranks: Ranks, placement: Placement, host: HostMemory) -> None:
        super().__init__(optimizer, ranks, placement, host)
        start = named_state(fresh_optimizer_state(optimizer))
        self.merger = Merger(self._NAME, start, ranks, host, only_clone=placement.only_clone, measured=False)

    @classmethod
    def need(cls, state: int, placement: Placement, rank: int) -> Need:
        """As `Reset.need`."""
        return super().need(state, placement, rank) + Merger.need(state, placement)

    def begin_round(self, clone: Clone) -> None:
        """As `Reset.begin_round`."""
        device = self._optimizer.param_groups[0]["params"][0].device
        # A copy: the optimizer would otherwise work in the merged ones.
        merged = {name: tensor.to(device, copy=True) for name, tensor in self.merger.tensors.items()}
        load_optimizer_state(self._optimizer, state_by_parameter(merged))

    def collect(self, clone: Clone | None, weights: Sequence[float]) -> None:
        """As `Reset.collect`."""
        took_part = clone is not None and clone.took_part
        self.merger.collect(named_state(optimizer_state(self._optimizer)) if took_part else None, weights)
        self.clear()

    def merge(self, clones: Iterable[Clone], rebased: Collection[int]) -> None:
        """As `Reset.merge`."""
        self.merger.merge()
        for key, tensor in self.merger.tensors.items() if rebased else ():
            if parameter_of(key) in rebased:
                tensor.zero_()

    def rest(self, clones: Iterable[Clone]) -> None:
        """As `Reset.rest`."""
        self.merger.rest()
        super().rest(clones)

    def pieces(self, start: str, so_far: str) -> dict[str, Piece]:
        """As `Reset.pieces`."""
        return self.merger.pieces(start, so_far)

    def restore(self, checkpoint: Checkpoint, total: float) -> None:
        """As `Reset.restore`.

        Raises:
            UserError: the checkpoint holds no average.
        """
        if not checkpoint.has(f"{self._NAME}.safetensors"):
            raise UserError(
                f"cannot resume from {checkpoint.path} with `--optimizer_across_rounds average`: it was written with "
                "`keep` or `reset`, and holds no average of the optimizer's state. Use one of these."
            )
        self.merger.restore(checkpoint, total)


POLICIES: dict[str, type[Reset]] = {"keep": Keep, "reset": Reset, "average": Average}


def _file(clone: Clone) -> str:
    return f"{clone.folder}/moments.pt"
