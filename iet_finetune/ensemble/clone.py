"""What belongs to one shard's clone from round to round, whether it is live or waits."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..method.rules import SkipRule
from .ledger import ShardLedger
from .meter import RoundMeter


@dataclass
class Clone:
    """What belongs to one shard's clone from round to round; its weights are live only while it is checked out.

    The rank that trains it keeps all of it up to date; the others know `step` and `began` from the last wave on.

    Attributes:
        shard: k.
        weight: n_k, or 1, in the merge.
        step: steps taken over the whole run.
        began: the same number when its latest round began.
        optimizer_state: the optimizer's state while the clone is idle; None at the start and after a reset.
        scaler: state of the gradient scaler, where fp16 training has one.
        drift: ‖θ_k − θ‖ / ‖θ‖ of the last round, θ being the denoiser it started from.
    """

    _PLAIN: ClassVar = ("step", "began", "scaler", "drift")
    _PARTS: ClassVar = ("rule", "ledger", "meter")

    shard: int
    weight: int
    rule: SkipRule
    ledger: ShardLedger
    meter: RoundMeter
    step: int = 0
    began: int = 0
    optimizer_state: dict[int, Any] | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    drift: float = 0.0

    @property
    def took_part(self) -> bool:
        """Whether it has taken a step since its latest round began."""
        return self.step > self.began

    @property
    def folder(self) -> str:
        """Of its files in a checkpoint."""
        return f"shard-{self.shard:05d}"

    @property
    def live_files(self) -> list[str]:
        """Those that a checkpoint holds of it in the middle of its round, except its optimizer state."""
        return [f"{self.folder}/{name}" for name in ("live.safetensors", "live_ema.safetensors", "clone.pt")]

    def state(self) -> dict[str, Any]:
        """Everything except weights and optimizer state, for a checkpoint."""
        plain = {name: getattr(self, name) for name in self._PLAIN}
        return {**plain, **{name: getattr(self, name).state_dict() for name in self._PARTS}}

    def copied_state(self) -> dict[str, Any]:
        """What `state` gives, which changes with the next step, as it is now."""
        return copy.deepcopy(self.state())

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        # The name of the first rule, in checkpoints from before there were others.
        state = {"rule": state.get("agc"), **state}
        for name in self._PLAIN:
            setattr(self, name, state[name])
        for name in self._PARTS:
            getattr(self, name).load_state_dict(state[name])


def seed_random_state(seed: int) -> None:
    """Seeds torch's global generators, from which dropout draws."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        # `torch.manual_seed` would note down for GPUs that may come who called it, anew each time.
        torch.default_generator.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of torch's generators of the host and of this rank's own GPU, from which dropout draws."""
    return {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Goes on drawing where `random_state` was taken, also on another GPU, and on a machine with more or fewer."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and (own := state["cuda"]):
        # Earlier versions wrote the states of all GPUs of the machine.
        here = torch.cuda.current_device()
        torch.cuda.set_rng_state(own[here if here < len(own) else 0])
