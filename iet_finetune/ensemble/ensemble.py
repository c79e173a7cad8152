"""Iterative ensemble training: clones are checked out, trained, collected, and merged in the end, on all ranks."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.groups import Placement, Ranks
from ..errors import UserError
from ..method.seeding import network_seed
from .checkpoint import Checkpoint, Piece, state_piece, tensors_piece
from .clone import Clone, random_state, seed_random_state, set_random_state
from .ema import EMA
from .host import HostMemory
from .merger import MergesClones
from .optimizers import (
    fresh_optimizer_state,
    is_fused,
    load_optimizer_state,
    named_state,
    optimizer_state,
    parameter_of,
    state_by_parameter,
    with_counts_apart,
)
from .trainable import Trainable

Tensors = Mapping[str, Tensor]


class Ensemble:
    """The merged denoiser and its clones, of which one at a time is live on the device of each rank.

    Args:
        trainable: the live tensors, holding the denoiser that the run starts from.
        optimizer: works on the trainable's parameters.
        ema: the live moving average, or None.
        clones: one for each shard, in order.
        mergers: of the "denoiser", and of the "ema" and the "moments" where there are such, in this order.
        ranks: all of them; this rank trains the shards that `placement` gives it.
        host: where the merged weights, the sums and the moments of resting clones lie.
        moments: what becomes of the optimizer's moments at a merge: each clone's are kept, or reset, or averaged.
        seed: the run's.

    Attributes:
        round: rounds completed.
        live: this rank's clone that is checked out, or None.
    """

    def __init__(
        self,
        trainable: Trainable,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        clones: Sequence[Clone],
        mergers: Mapping[str, MergesClones],
        ranks: Ranks,
        placement: Placement,
        host: HostMemory,
        *,
        moments: str,
        seed: int,
    ) -> None:
        self._trainable = trainable
        self._optimizer = optimizer
        self._ema = ema
        self.clones = list(clones)
        self._ranks = ranks
        self._placement = placement
        self._host = host
        self._moments = moments
        self._seed = seed
        self._mergers = mergers
        self.round = 0
        self.live: Clone | None = None
        self._finished = 0
        # The shards, of all ranks, that a checkpoint caught in the middle of their round, until they are collected.
        self._amid: dict[int, Checkpoint] = {}
        # Those of this rank, until they are checked out.
        self._to_resume: set[int] = set()
        self._buffers: dict[int, Any] = {}
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
        return bool(self._amid) or 0 < self._finished < len(self.clones)

    def is_amid(self, shard: int) -> bool:
        """Whether a checkpoint caught the shard's clone, of whatever rank, in the middle of the present round."""
        return shard in self._amid

    @property
    def needed(self) -> Path | None:
        """The checkpoint that clones, of whatever rank, may still have to go on from; None if there is none."""
        return next((checkpoint.path for checkpoint in self._amid.values()), None)

    def checkout(self, wave: Sequence[int]) -> Clone | None:
        """Makes this rank's clone of a wave live: the denoiser's weights, its own moments, dropout seeded anew.

        A clone that a checkpoint caught in the middle of its round goes on from where it stood.

        Returns:
            the live clone, or None if this rank has none in the wave.
        """
        if self._placement.group_size > 1:
            # A group's collectives begin only when all have come; those without a clone come to the meeting as well.
            self._ranks.barrier()
        shards = [shard for shard in wave if shard in self._placement.shards_of(self._ranks.rank)]
        if not shards:
            return None
        self.live = clone = self.clones[shards[0]]
        if clone.shard in self._to_resume:
            self._to_resume.remove(clone.shard)
            self._go_on(clone, self._amid[clone.shard])
            return clone
        self._mergers["denoiser"].load_into(self._trainable)
        if self._ema is not None and self.average is not None:
            self._ema.load(self.average)
        self._start_moments(clone)
        self._rest()
        clone.began = clone.step
        self._start_of_live = clone.copied_state()
        seed_random_state(self._network_seed(clone))
        return clone

    def _network_seed(self, clone: Clone) -> int:
        return network_seed(self._seed, clone.shard, self.round, self._placement.member(self._ranks.rank))

    def _start_moments(self, clone: Clone) -> None:
        if "moments" in self._mergers:
            # A copy: the optimizer would otherwise work in the merged ones.
            device = next(iter(self._trainable.parameters.values())).device
            merged = {name: t.to(device, copy=True) for name, t in self._mergers["moments"].tensors.items()}
            load_optimizer_state(self._optimizer, state_by_parameter(merged))
        else:
            load_optimizer_state(self._optimizer, clone.optimizer_state or self._first_moments())
            clone.optimizer_state = None

    def _first_moments(self) -> dict[int, Any] | None:
        """What a clone without moments begins with; None leaves it to the optimizer."""
        stay = self._moments == "keep" and self._host.in_place and is_fused(self._optimizer)
        return fresh_optimizer_state(self._optimizer) if stay else None

    def set_back(self) -> bool:
        """Takes back what the live clone did in this round; its moments, which may be spoilt, start anew.

        Returns:
            whether that could be done: how a clone began that a checkpoint caught midway is not known, and with
            several ranks the others have gone on.
        """
        if self.live is None or self._start_of_live is None or self._ranks.size > 1:
            return False
        self.live.load_state(self._start_of_live)
        self._optimizer.state.clear()
        self.live = None
        return True

    def collect(self, wave: Sequence[int]) -> None:
        """Adds the clones of a wave that have trained their round to the sums: n_k · θ_k. Every rank takes part.

        One whose steps were used up before this round is left out: it would only hold the others back.
        """
        clone = self.live
        weights = self._tell_steps(wave)
        took_part = clone is not None and clone.step > clone.began
        for name, merger in self._mergers.items():
            drift = merger.collect(self._live(name) if took_part else None, weights)
            if clone is not None and name == "denoiser":
                clone.drift = drift
        if clone is not None and self._moments == "keep":
            # Without offloading the moments change owner rather than being copied; on a device they move to the host.
            state: Any = optimizer_state(self._optimizer)
            state, buffer = with_counts_apart(state) if self._host.in_files else state, self._buffers.get(clone.shard)
            clone.optimizer_state = self._buffers[clone.shard] = self._host.keep(state, into=buffer)
        self._optimizer.state.clear()
        self._rest()
        self._host.give_back()
        self._finished = wave[-1] + 1
        self._amid = {shard: checkpoint for shard, checkpoint in self._amid.items() if shard not in wave}
        self.live = None

    def _tell_steps(self, wave: Sequence[int]) -> list[int]:
        """Lets all ranks know how far the wave's clones have come; returns the weights in the merge by rank."""
        answers = self.live is not None and self.live in self.own
        gathered = self._ranks.all_gather_object(
            [self.live.shard, self.live.step, self.live.began] if answers and self.live else None
        )
        weights = [0] * self._ranks.size
        for rank, facts in enumerate(gathered):
            if facts is not None:
                clone = self.clones[facts[0]]
                clone.step, clone.began = facts[1:]
                weights[rank] = clone.weight if clone.step > clone.began else 0
        return weights

    def merge(self) -> float:
        """θ ← Σ_k n_k θ_k / Σ_k n_k over the clones that trained in this round; for what else is merged too.

        Every rank takes part.

        Returns:
            ‖θ_new − θ‖ / ‖θ‖.
        """
        drift = {name: merger.merge() for name, merger in self._mergers.items()}["denoiser"]
        self._forget_moments(self._mergers["denoiser"].rebased)
        self._finished = 0
        self.round += 1
        return drift

    def _forget_moments(self, names: Sequence[str]) -> None:
        """The moments of parameters that a merge has put into another basis start anew."""
        places = {name: index for index, name in enumerate(self._trainable.parameters)}
        gone = {places[name] for name in names}
        for clone in self.clones if gone else ():
            if clone.optimizer_state:
                clone.optimizer_state = {
                    index: state for index, state in clone.optimizer_state.items() if index not in gone
                }
        if "moments" in self._mergers:
            for key, tensor in self._mergers["moments"].tensors.items():
                if parameter_of(key) in gone:
                    tensor.zero_()

    def release(self) -> None:
        """Gives back the memory of the device that only training needs; nothing can be trained any more."""
        self._optimizer.zero_grad()
        self._optimizer.state.clear()
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
        return self._trainable.tensors if name == "denoiser" else named_state(optimizer_state(self._optimizer))

    def _rest(self) -> None:
        for merger in self._mergers.values():
            merger.rest()
        self._host.rest(*(clone.optimizer_state for clone in self.clones if clone.optimizer_state))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def pieces(self) -> dict[str, Piece]:
        """What this rank writes into a checkpoint, by file name."""
        start, so_far = f"round {self.round}", f"round {self.round} after {self._finished}"
        pieces: dict[str, Piece] = {}
        for merger in self._mergers.values():
            pieces |= merger.pieces(start, so_far)
        for clone in self.own:
            pieces |= self._clone_pieces(clone)
        member = self._placement.member(self._ranks.rank)
        if member and self.live is not None:
            version = f"round {self.round} step {self.live.step}"
            pieces[f"{self.live.folder}/random-{member}.pt"] = state_piece(version, random_state())
        return pieces

    def _clone_pieces(self, clone: Clone) -> dict[str, Piece]:
        live, version = clone is self.live, f"round {self.round} step {clone.step}"
        moments = optimizer_state(self._optimizer) if live else clone.optimizer_state
        pieces = {f"{clone.folder}/moments.pt": self._moments_piece(clone, moments)} if moments else {}
        if clone.shard in self._to_resume:
            saved = self._amid[clone.shard]
            return pieces | {name: saved.piece(name) for name in clone.live_files if saved.has(name)}
        state = clone.state()
        if live:
            state["random"] = random_state()
            pieces[f"{clone.folder}/live.safetensors"] = tensors_piece(version, self._trainable.tensors)
            if self._ema is not None:
                pieces[f"{clone.folder}/live_ema.safetensors"] = tensors_piece(version, self._ema.tensors)
        # A clone may be collected without having taken a step: then only this tells its states apart.
        place = "live" if live else "collected" if clone.shard < self._finished else "pending"
        pieces[f"{clone.folder}/clone.pt"] = state_piece(f"{version} {place}", state)
        return pieces

    def _moments_piece(self, clone: Clone, moments: Any) -> Piece:
        # Some may have been dropped since this step.
        piece = state_piece(f"step {clone.step}, {len(moments)} of them", moments)

        def write(path: Path) -> None:
            piece.write(path)
            # Else those of all clones, read from their files one after the other, would be in memory in the end.
            self._host.rest(moments)

        return Piece(piece.version, write)

    def position(self) -> dict[str, Any]:
        """Where the run stands, for a checkpoint's manifest; the same on all ranks."""
        return {"round": self.round, "finished": self._finished, "sum_total": self._mergers["denoiser"].total}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to where a checkpoint was written, by whatever number of ranks.

        Raises:
            UserError: it is damaged, or has no average of the moments where there is to be one.
        """
        if self._moments == "average" and not checkpoint.has("moments.safetensors"):
            raise UserError(
                f"cannot resume from {checkpoint.path} with `--optimizer_across_rounds average`: it was written with "
                "`keep` or `reset`, and holds no average of the moments. Use one of these."
            )
        position = checkpoint.manifest["position"]
        self.round, self._finished = position["round"], position["finished"]
        for merger in self._mergers.values():
            merger.restore(checkpoint, position["sum_total"])
        self.load_clones(checkpoint)
        for clone in self.clones:
            amid = checkpoint.has(f"{clone.folder}/live.safetensors")
            if amid:
                self._amid[clone.shard] = checkpoint
            if clone.shard in self._placement.shards_of(self._ranks.rank):
                if amid:
                    self._to_resume.add(clone.shard)
                # What rests of a run that kept moments is not wanted in one that does not.
                if (amid or self._moments == "keep") and checkpoint.has(f"{clone.folder}/moments.pt"):
                    moments = self._host.keep(checkpoint.state(f"{clone.folder}/moments.pt"))
                    clone.optimizer_state = self._buffers[clone.shard] = moments
                    self._host.rest(moments)
        self._rest()

    def load_clones(self, checkpoint: Checkpoint) -> None:
        """Takes up what all clones are but weights and moments, those of other ranks too."""
        for clone in self.clones:
            clone.load_state(checkpoint.state(f"{clone.folder}/clone.pt"))

    def _go_on(self, clone: Clone, checkpoint: Checkpoint) -> None:
        self._mergers["denoiser"].load_into(self._trainable)
        self._trainable.load(checkpoint.tensors(f"{clone.folder}/live.safetensors"))
        if self._ema is not None:
            self._ema.load(checkpoint.tensors(f"{clone.folder}/live_ema.safetensors"))
        load_optimizer_state(self._optimizer, clone.optimizer_state)
        clone.optimizer_state = None
        self._start_of_live = None
        member = self._placement.member(self._ranks.rank)
        theirs = f"{clone.folder}/random-{member}.pt"
        if not member:
            set_random_state(checkpoint.state(f"{clone.folder}/clone.pt")["random"])
        elif checkpoint.has(theirs):
            set_random_state(checkpoint.state(theirs))
        else:
            seed_random_state(self._network_seed(clone))
