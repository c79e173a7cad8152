"""Iterative ensemble training: clones are checked out, trained, collected, and merged in the end, on all ranks."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..distributed.groups import Placement, Ranks
from ..method.seeding import network_seed
from .across_rounds import Reset
from .checkpoint import Checkpoint
from .clone import Clone, seed_random_state
from .ema import EMA
from .merger import MergesClones
from .pieces import Piece
from .snapshot import Snapshots
from .trainable import Trainable

Tensors = Mapping[str, Tensor]


class Ensemble:
    """The merged denoiser and its clones, of which one at a time is live on the device of each rank.

    Args:
        trainable: the live tensors, holding the denoiser that the run starts from.
        ema: the live moving average, or None.
        clones: one for each shard, in order.
        mergers: of the "denoiser", and of the "ema" where there is one, in this order.
        policy: what becomes of the optimizer's state between rounds.
        ranks: all of them; this rank trains the shards that `placement` gives it.
        seed: the run's.

    Attributes:
        round: rounds completed.
        live: this rank's clone that is checked out, or None.
    """

    def __init__(
        self,
        trainable: Trainable,
        ema: EMA | None,
        clones: Sequence[Clone],
        mergers: Mapping[str, MergesClones],
        policy: Reset,
        ranks: Ranks,
        placement: Placement,
        *,
        seed: int,
    ) -> None:
        self._trainable, self._ema, self._mergers, self._policy = trainable, ema, mergers, policy
        self.clones = list(clones)
        self._ranks, self._placement, self._seed = ranks, placement, seed
        self._snapshots = Snapshots(trainable, ema, self.clones, mergers, policy, placement, ranks.rank)
        self.round = 0
        self.live: Clone | None = None
        self._finished = 0
        self._start_of_live: dict[str, Any] | None = None

    @property
    def denoiser(self) -> Tensors:
        """The merged weights from which the round started, on the host."""
        return self._mergers["denoiser"].tensors

    @property
    def average(self) -> Tensors | None:
        """The merged moving average, or None."""
        return self._mergers["ema"].tensors if self._ema is not None else None

    @property
    def own(self) -> list[Clone]:
        """The clones that this rank trains and answers for; of a group's ranks only the first answers."""
        if self._placement.member(self._ranks.rank):
            return []
        return [self.clones[shard] for shard in self._placement.shards_of(self._ranks.rank)]

    @property
    def steps(self) -> list[int]:
        """Steps that each clone has taken."""
        return [clone.step for clone in self.clones]

    @property
    def step(self) -> int:
        """Steps of all clones together."""
        return sum(self.steps)

    @property
    def pending_waves(self) -> Iterator[list[int]]:
        """The shards still to be trained in this round, in waves of those that train at the same time."""
        while self._finished < len(self.clones):
            yield next(self._placement.waves(self._finished))

    @property
    def in_midst_of_round(self) -> bool:
        """Whether some of this round is done and some is not."""
        return self.needed is not None or 0 < self._finished < len(self.clones)

    def is_midway(self, shard: int) -> bool:
        """Whether a checkpoint caught the shard's clone, of whatever rank, in the middle of the present round."""
        return self._snapshots.is_midway(shard)

    @property
    def needed(self) -> Path | None:
        """The checkpoint that clones, of whatever rank, may still have to go on from; None if there is none."""
        return self._snapshots.needed

    def checkout(self, wave: Sequence[int]) -> Clone | None:
        """Makes this rank's clone of a wave live: the denoiser's weights, its optimizer state, dropout seeded anew.

        A clone that a checkpoint caught in the middle of its round goes on from where it stood.

        Returns:
            the live clone, or None if this rank has none in the wave.
        """
        if self._placement.group_size > 1:
            # A group's collectives begin only when all have come; ranks without a clone come to the barrier as well.
            self._ranks.barrier()
        shards = [shard for shard in wave if shard in self._placement.shards_of(self._ranks.rank)]
        if not shards:
            return None
        self.live = clone = self.clones[shards[0]]
        seed_random_state(network_seed(self._seed, clone.shard, self.round, self._placement.member(self._ranks.rank)))
        if self._snapshots.resume(clone):
            self._start_of_live = None
            return clone
        self._mergers["denoiser"].load_into(self._trainable)
        if self._ema is not None and self.average is not None:
            self._ema.load(self.average)
        self._policy.begin_round(clone)
        self._rest()
        clone.began = clone.step
        self._start_of_live = clone.copied_state()
        return clone

    def set_back(self) -> bool:
        """Takes back what the live clone did in this round; its optimizer state, which may be spoilt, starts over.

        Returns:
            whether that could be done: how a clone began that a checkpoint caught midway is not known, and with
            several ranks the others have gone on.
        """
        if self.live is None or self._start_of_live is None or self._ranks.size > 1:
            return False
        self.live.load_state(self._start_of_live)
        self._policy.clear()
        self.live = None
        return True

    def collect(self, wave: Sequence[int]) -> None:
        """Adds the clones of a wave that have trained their round to the sums: n_k · θ_k. Every rank takes part.

        One whose steps were used up before this round is left out: it would only hold the others back.
        """
        clone = self.live
        weights = self._gather_steps(wave)
        took_part = clone is not None and clone.took_part
        for name, merger in self._mergers.items():
            drift = merger.collect(self._live(name) if took_part else None, weights)
            if clone is not None and name == "denoiser":
                clone.drift = drift
        self._policy.collect(clone, weights)
        self._rest()
        self._finished = wave[-1] + 1
        self._snapshots.forget(wave)
        self.live = None

    def _gather_steps(self, wave: Sequence[int]) -> list[int]:
        """Gathers how far the wave's clones have come; returns the weights in the merge by rank."""
        answers = self.live is not None and self.live in self.own
        gathered = self._ranks.all_gather_object(
            [self.live.shard, self.live.step, self.live.began] if answers and self.live else None
        )
        weights = [0] * self._ranks.size
        for rank, facts in enumerate(gathered):
            if facts is not None:
                clone = self.clones[facts[0]]
                clone.step, clone.began = facts[1:]
                weights[rank] = clone.weight if clone.took_part else 0
        return weights

    def merge(self) -> float:
        """θ ← Σ_k n_k θ_k / Σ_k n_k over the clones that trained in this round; for what else is merged too.

        Every rank takes part.

        Returns:
            ‖θ_new − θ‖ / ‖θ‖.
        """
        drift = {name: merger.merge() for name, merger in self._mergers.items()}["denoiser"]
        numbers = {name: number for number, name in enumerate(self._trainable.parameters)}
        self._policy.merge(self.clones, {numbers[name] for name in self._mergers["denoiser"].rebased})
        self._finished = 0
        self.round += 1
        return drift

    def release(self) -> None:
        """Gives back the memory of the device that only training needs; nothing can be trained any more."""
        for parameter in self._trainable.parameters.values():
            parameter.grad = None
        self._policy.clear()
        if self._ema is not None:
            self._ema.tensors.clear()

    def load_result(self) -> None:
        """Puts the merged denoiser, or its moving average if there is one, into the live tensors."""
        for name in ("denoiser", "ema"):
            if name in self._mergers:
                self._mergers[name].load_into(self._trainable)

    @property
    def facts_of_merge(self) -> Mapping[str, float]:
        """Numbers by name that belong into a round's metrics."""
        return self._mergers["denoiser"].facts

    def _live(self, name: str) -> Tensors:
        if name == "ema" and self._ema is not None:
            return self._ema.tensors
        return self._trainable.tensors

    def _rest(self) -> None:
        for merger in self._mergers.values():
            merger.rest()
        self._policy.rest(self.clones)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def pieces(self) -> dict[str, Piece]:
        """What this rank writes into a checkpoint, by file name."""
        return self._snapshots.pieces(self.live, self.round, self._finished)

    def position(self) -> dict[str, Any]:
        """Where the run stands, for a checkpoint's manifest; the same on all ranks."""
        return {"round": self.round, "finished": self._finished, "sum_total": self._mergers["denoiser"].total}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to where a checkpoint was written, by whatever number of ranks.

        Raises:
            UserError: it is damaged, or has no average of the optimizer's state where there is to be one.
        """
        self._snapshots.restore(checkpoint)
        self.round, self._finished = (checkpoint.manifest["position"][name] for name in ("round", "finished"))
        self._rest()

    def load_clones(self, checkpoint: Checkpoint) -> None:
        """Restores each clone's state, those of other ranks too, except weights and optimizer state."""
        self._snapshots.load_clones(checkpoint)
