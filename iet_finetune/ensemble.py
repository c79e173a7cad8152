"""Iterative ensemble training: clones are checked out one by one, trained, collected, and merged in the end."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .adapters import Trainable
from .agc import AntiGradientControl
from .checkpoint import Checkpoint, Piece, state_piece, tensors_piece
from .ema import EMA
from .ledger import ShardLedger
from .merging import WeightedSum
from .seeding import network_seed
from .tracking import RoundMeter

Tensors = Mapping[str, Tensor]


@dataclass
class Clone:
    """What belongs to one shard's clone from round to round; its weights are live only while it is checked out.

    Attributes:
        shard: k.
        weight: n_k, or 1, in the merge.
        step: steps taken over the whole run.
        began: the same number when its latest round began.
        moments: the optimizer's state while another clone is live; None at the start and after a reset.
        scaler: state of the gradient scaler, where fp16 training has one.
        drift: ‖θ_k − θ‖ / ‖θ‖ of the last round, θ being the denoiser it started from.
    """

    _PLAIN: ClassVar = ("step", "began", "scaler", "drift")
    _MODULES: ClassVar = ("agc", "ledger", "meter")

    shard: int
    weight: int
    agc: AntiGradientControl
    ledger: ShardLedger
    meter: RoundMeter
    step: int = 0
    began: int = 0
    moments: dict[int, Any] | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    drift: float = 0.0

    def state(self) -> dict[str, Any]:
        """Everything but weights and moments, for a checkpoint."""
        plain = {name: getattr(self, name) for name in self._PLAIN}
        return {**plain, **{name: getattr(self, name).state_dict() for name in self._MODULES}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave."""
        for name in self._PLAIN:
            setattr(self, name, state[name])
        for name in self._MODULES:
            getattr(self, name).load_state_dict(state[name])


class Ensemble:
    """The merged denoiser and its clones, of which one at a time is live on the device.

    Args:
        trainable: the live tensors, holding the denoiser that the run starts from.
        optimizer: works on the trainable's parameters.
        ema: the live moving average, or None.
        clones: one for each shard, in order.
        keep_moments: whether a clone's optimizer moments outlast a merge.
        seed: the run's.

    Attributes:
        denoiser: the merged weights from which the round started, on the host.
        average: the merged moving average, or None.
        round: rounds completed.
        live: the clone that is checked out, or None.
    """

    def __init__(
        self,
        trainable: Trainable,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        clones: Sequence[Clone],
        *,
        keep_moments: bool,
        seed: int,
    ) -> None:
        self._trainable = trainable
        self._optimizer = optimizer
        self._ema = ema
        self.clones = list(clones)
        self._keep_moments = keep_moments
        self._seed = seed
        self.denoiser = trainable.read()
        self.average = ema.read() if ema is not None else None
        self.round = 0
        self.live: Clone | None = None
        self._finished = 0
        self._sum, self._average_sum = WeightedSum(), WeightedSum()
        self._take_up: Callable[[], None] | None = None
        self._start_of_live: dict[str, Any] | None = None

    @property
    def steps(self) -> list[int]:
        """Steps that each clone has taken."""
        return [clone.step for clone in self.clones]

    @property
    def step(self) -> int:
        """Steps of all clones together."""
        return sum(self.steps)

    @property
    def pending_shards(self) -> Iterator[int]:
        """The shards still to be trained in this round, in order."""
        while self._finished < len(self.clones):
            yield self._finished

    @property
    def in_midst_of_round(self) -> bool:
        """Whether some of this round is done and some is not."""
        return self._take_up is not None or 0 < self._finished < len(self.clones)

    def checkout(self, shard: int) -> Clone:
        """Makes a shard's clone live: the denoiser's weights, its own moments, dropout seeded for the round.

        A clone that a checkpoint caught in the middle of its round goes on from where it stood.
        """
        self.live = clone = self.clones[shard]
        if self._take_up is not None:
            self._take_up()
            self._take_up, self._start_of_live = None, None
            return clone
        self._trainable.load(self.denoiser)
        if self._ema is not None and self.average is not None:
            self._ema.load(self.average)
        self._load_moments(clone.moments)
        clone.moments = None
        clone.began = clone.step
        self._start_of_live = copy.deepcopy(clone.state())
        torch.manual_seed(network_seed(self._seed, shard, self.round))
        return clone

    def set_back(self) -> bool:
        """Takes back what the live clone did in this round; its moments, which may be spoilt, start anew.

        Returns:
            whether that could be done: how a clone began that a checkpoint caught midway is not known.
        """
        if self.live is None or self._start_of_live is None:
            return False
        self.live.load_state(self._start_of_live)
        self._optimizer.state.clear()
        self.live = None
        return True

    def collect(self, clone: Clone) -> None:
        """Adds a clone that has trained its round to the sum: n_k · θ_k.

        One whose steps were used up before this round is left out: it would only hold the others back.
        """
        clone.drift = relative_distance(self._trainable.tensors, self.denoiser)
        if clone.step > clone.began:
            self._sum.add(self._trainable.tensors, clone.weight)
            if self._ema is not None:
                self._average_sum.add(self._ema.tensors, clone.weight)
        # The moments change owner rather than being copied; on a device they move to the host.
        if self._keep_moments:
            clone.moments = _on_host(self._optimizer.state_dict()["state"])
        self._optimizer.state.clear()
        self._finished += 1
        self.live = None

    def merge(self) -> float:
        """θ ← Σ_k n_k θ_k / Σ_k n_k over the clones that trained in this round; for the moving averages too.

        Returns:
            ‖θ_new − θ‖ / ‖θ‖.
        """
        merged = self._sum.mean()
        drift = relative_distance(merged, self.denoiser)
        self.denoiser = merged
        if self._ema is not None:
            self.average = self._average_sum.mean()
        self._sum, self._average_sum = WeightedSum(), WeightedSum()
        self._finished = 0
        self.round += 1
        return drift

    def _load_moments(self, moments: dict[int, Any] | None) -> None:
        self._optimizer.state.clear()
        if moments:
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": moments, "param_groups": groups})

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def pieces(self) -> dict[str, Piece]:
        """Everything a checkpoint needs, by file name."""
        pieces = self._merged_pieces()
        for clone in self.clones:
            folder, version = f"shard-{clone.shard:05d}", f"round {self.round} step {clone.step}"
            live = clone is self.live
            state = clone.state()
            if live:
                state["random"] = _random_state()
                pieces[f"{folder}/live.safetensors"] = tensors_piece(version, self._trainable.tensors)
                if self._ema is not None:
                    pieces[f"{folder}/live_ema.safetensors"] = tensors_piece(version, self._ema.tensors)
            moments = self._optimizer.state_dict()["state"] if live else clone.moments
            if moments:
                pieces[f"{folder}/moments.pt"] = state_piece(f"step {clone.step}", moments)
            # A clone may be collected without having taken a step: then only this tells its states apart.
            place = "live" if live else "collected" if clone.shard < self._finished else "pending"
            pieces[f"{folder}/clone.pt"] = state_piece(f"{version} {place}", state)
        return pieces

    def _merged_pieces(self) -> dict[str, Piece]:
        start, so_far = f"round {self.round}", f"round {self.round} after {self._finished}"
        pieces = {"denoiser.safetensors": tensors_piece(start, self.denoiser)}
        if self.average is not None:
            pieces["ema.safetensors"] = tensors_piece(start, self.average)
        if self._sum.total:
            pieces["sum.safetensors"] = tensors_piece(so_far, self._sum.state_dict())
            if self._ema is not None:
                pieces["ema_sum.safetensors"] = tensors_piece(so_far, self._average_sum.state_dict())
        return pieces

    def position(self) -> dict[str, Any]:
        """Where the run stands, for a checkpoint's manifest."""
        live = self.live.shard if self.live is not None else None
        return {"round": self.round, "finished": self._finished, "sum_total": self._sum.total, "live": live}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to where a checkpoint was written."""
        position = checkpoint.manifest["position"]
        self.round, self._finished = position["round"], position["finished"]
        self.denoiser = checkpoint.tensors("denoiser.safetensors")
        if self._ema is not None:
            self.average = checkpoint.tensors("ema.safetensors")
        if position["sum_total"]:
            self._restore_sums(checkpoint, position["sum_total"])
        states = [self._restore_clone(checkpoint, clone) for clone in self.clones]
        if position["live"] is not None:
            live = self.clones[position["live"]]
            self._take_up = lambda: self._restore_live(checkpoint, live, states[live.shard]["random"])

    def _restore_sums(self, checkpoint: Checkpoint, total: float) -> None:
        self._sum.load_state_dict(checkpoint.tensors("sum.safetensors"), total, self.denoiser)
        if self.average is not None:
            self._average_sum.load_state_dict(checkpoint.tensors("ema_sum.safetensors"), total, self.average)

    def _restore_clone(self, checkpoint: Checkpoint, clone: Clone) -> Mapping[str, Any]:
        folder = f"shard-{clone.shard:05d}"
        state = checkpoint.state(f"{folder}/clone.pt")
        clone.load_state(state)
        if checkpoint.has(f"{folder}/moments.pt"):
            clone.moments = checkpoint.state(f"{folder}/moments.pt")
        return state

    def _restore_live(self, checkpoint: Checkpoint, clone: Clone, random: Mapping[str, Any]) -> None:
        folder = f"shard-{clone.shard:05d}"
        self._trainable.load(checkpoint.tensors(f"{folder}/live.safetensors"))
        if self._ema is not None:
            self._ema.load(checkpoint.tensors(f"{folder}/live_ema.safetensors"))
        self._load_moments(clone.moments)
        clone.moments = None
        _set_random_state(random)


def relative_distance(tensors: Tensors, reference: Tensors) -> float:
    """‖tensors − reference‖ / ‖reference‖ over all floating-point tensors, in fp32; a host number."""
    moved, norm = [], []
    # A sum's bits depend on its order, and a file's tensors come in another order than the module's.
    for name, theirs in sorted(reference.items()):
        if theirs.is_floating_point():
            ours = tensors[name].detach()
            theirs = theirs.to(ours.device)
            moved.append(torch.linalg.vector_norm(ours - theirs))
            norm.append(torch.linalg.vector_norm(theirs))
    total = torch.linalg.vector_norm(torch.stack(norm)).clamp(min=torch.finfo(torch.float32).tiny)
    return float(torch.linalg.vector_norm(torch.stack(moved)) / total)


def _on_host(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _on_host(value) for key, value in state.items()}
    return state.cpu() if isinstance(state, Tensor) else state


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
