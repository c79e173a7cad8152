"""What an ensemble writes into a checkpoint, and how its clones go on from one, on any number of ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..distributed.groups import Placement
from .across_rounds import Reset
from .checkpoint import Checkpoint
from .clone import Clone, random_state, set_random_state
from .ema import EMA
from .merger import MergesClones
from .pieces import Piece, state_piece, tensors_piece
from .trainable import Trainable


class Snapshots:
    """Writes the state of an ensemble's parts into checkpoints, and restores it.

    Args:
        clones: of the whole run, in the order of their shards.
        rank: this rank's number.
    """

    def __init__(
        self,
        trainable: Trainable,
        ema: EMA | None,
        clones: Sequence[Clone],
        mergers: Mapping[str, MergesClones],
        policy: Reset,
        placement: Placement,
        rank: int,
    ) -> None:
        self._trainable, self._ema, self._clones, self._mergers, self._policy = trainable, ema, clones, mergers, policy
        self._shards = placement.shards_of(rank)
        self._member = placement.member(rank)
        # The shards, of all ranks, that a checkpoint caught in the middle of their round, until they are collected.
        self._midway: dict[int, Checkpoint] = {}
        # Those of this rank, until they are checked out.
        self._to_resume: set[int] = set()

    def is_midway(self, shard: int) -> bool:
        """Whether a checkpoint caught the shard's clone, of whatever rank, in the middle of the present round."""
        return shard in self._midway

    @property
    def needed(self) -> Path | None:
        """The checkpoint that clones, of whatever rank, may still have to go on from; None if there is none."""
        return next((checkpoint.path for checkpoint in self._midway.values()), None)

    def forget(self, wave: Sequence[int]) -> None:
        """Notes that these shards' clones have been collected."""
        self._midway = {shard: checkpoint for shard, checkpoint in self._midway.items() if shard not in wave}

    # --- writing -----------------------------------------------------------------------------------------------------

    def pieces(self, live: Clone | None, finished_round: int, finished: int) -> dict[str, Piece]:
        """What this rank writes into a checkpoint, by file name.

        Args:
            live: this rank's clone that is checked out.
            finished_round: rounds completed.
            finished: shards collected in this round.
        """
        start, so_far = f"round {finished_round}", f"round {finished_round} after {finished}"
        pieces = self._policy.pieces(start, so_far)
        for merger in self._mergers.values():
            pieces |= merger.pieces(start, so_far)
        if not self._member:
            for shard in self._shards:
                clone = self._clones[shard]
                place = "live" if clone is live else "collected" if shard < finished else "pending"
                pieces |= self._clone_pieces(clone, f"{start} step {clone.step}", place)
        elif live is not None:
            pieces[self._random_file(live)] = state_piece(f"{start} step {live.step}", random_state())
        return pieces

    def _clone_pieces(self, clone: Clone, version: str, place: str) -> dict[str, Piece]:
        live = place == "live"
        pieces = self._policy.clone_pieces(clone, live=live)
        if clone.shard in self._to_resume:
            saved = self._midway[clone.shard]
            return pieces | {name: saved.piece(name) for name in clone.live_files if saved.has(name)}
        state = clone.state()
        if live:
            state["random"] = random_state()
            pieces[f"{clone.folder}/live.safetensors"] = tensors_piece(version, self._trainable.tensors)
            if self._ema is not None:
                pieces[f"{clone.folder}/live_ema.safetensors"] = tensors_piece(version, self._ema.tensors)
        # A clone may be collected without having taken a step: then only `place` tells its states apart.
        pieces[f"{clone.folder}/clone.pt"] = state_piece(f"{version} {place}", state)
        return pieces

    def _random_file(self, clone: Clone) -> str:
        return f"{clone.folder}/random-{self._member}.pt"

    # --- reading -----------------------------------------------------------------------------------------------------

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores mergers, optimizer state and clones; clones in the middle of their round wait for `resume`.

        Raises:
            UserError: it is damaged, or has no average of the optimizer's state where there is to be one.
        """
        total = checkpoint.manifest["position"]["sum_total"]
        self._policy.restore(checkpoint, total)
        for merger in self._mergers.values():
            merger.restore(checkpoint, total)
        self.load_clones(checkpoint)
        for clone in self._clones:
            midway = checkpoint.has(f"{clone.folder}/live.safetensors")
            if midway:
                self._midway[clone.shard] = checkpoint
            if clone.shard in self._shards:
                if midway:
                    self._to_resume.add(clone.shard)
                self._policy.restore_clone(clone, checkpoint, midway=midway)

    def load_clones(self, checkpoint: Checkpoint) -> None:
        """Restores each clone's state, those of other ranks too, except weights and optimizer state."""
        for clone in self._clones:
            clone.load_state(checkpoint.state(f"{clone.folder}/clone.pt"))

    def resume(self, clone: Clone) -> bool:
        """Puts a clone that a checkpoint caught in the middle of its round into the live tensors, as it stood there.

        Returns:
            whether it is such a clone. Otherwise nothing is done.
        """
        if clone.shard not in self._to_resume:
            return False
        self._to_resume.remove(clone.shard)
        checkpoint = self._midway[clone.shard]
        self._mergers["denoiser"].load_into(self._trainable)
        self._trainable.load(checkpoint.tensors(f"{clone.folder}/live.safetensors"))
        if self._ema is not None:
            self._ema.load(checkpoint.tensors(f"{clone.folder}/live_ema.safetensors"))
        self._policy.resume(clone)
        if not self._member:
            set_random_state(checkpoint.state(f"{clone.folder}/clone.pt")["random"])
        elif checkpoint.has(self._random_file(clone)):
            set_random_state(checkpoint.state(self._random_file(clone)))
        return True
