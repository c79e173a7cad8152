"""The held-out loss by round; `--stop_when auto` ends a run once it falls no more, and keeps the best round."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..method.objective import Objective
from ..method.rules import SkipRule
from .lending import Lender

# Of the noise that is added to held-out images.
SEED = 5
# Middles of as many parts of the whole schedule; and held-out images, if there are so many.
LEVELS, MOST_HELDOUT = 4, 64
# Of the training's time at most.
BUDGET = 0.05


@dataclass(frozen=True)
class Look:
    """What was found after a round.

    Attributes:
        round, step: of the run, the latter of all clones together.
        loss: mean of the logarithms of the held-out losses.
    """

    round: int
    step: int
    loss: float


@dataclass
class Stopping:
    """Looks at held-out images from round to round, and says when it is enough; the same on all ranks.

    The loss is that of what would be saved, with the same noise in every look, at `LEVELS` noise levels that count the
    same. If looking after every round would take more than a twentieth of the time, it skips some rounds.

    Args:
        patience: looks in a row without a lower loss; None never stops, and keeps the last round.
        watches: whether there are held-out images to look at.

    Attributes:
        looks: so far.
    """

    patience: int | None
    watches: bool = True
    looks: list[Look] = field(default_factory=list)

    @property
    def best(self) -> Look | None:
        """The look whose round is kept; None before the first look, and if the last round is kept."""
        return self.lowest if self.patience is not None else None

    @property
    def lowest(self) -> Look | None:
        """The look with the lowest loss, the first of several; None before the first look."""
        return min(self.looks, key=lambda look: look.loss, default=None)

    def look(self, lender: Lender, objective: Objective, round_: int, step: int, *, last: bool) -> float | None:
        """Looks after a round, if it is time; returns the loss. Every rank takes part.

        Args:
            last: whether the run ends with this round, which is always looked at.

        Raises:
            UserError: an image cannot be read.
        """
        heldout = min(len(lender.heldout_hashes), MOST_HELDOUT)
        every = math.ceil(heldout * LEVELS / max(1.0, BUDGET * lender.passes_a_visit * lender.visits))
        if not self.watches or not (last or round_ % every == 0):
            return None
        middles = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
        timesteps = objective.nearest(middles)[0].tolist()
        losses = lender.heldout_losses(range(heldout), timesteps, SEED)
        loss = losses.double().clamp(min=torch.finfo(losses.dtype).tiny).log().mean().item()
        self.looks.append(Look(round_, step, loss))
        return loss

    def reason(self, rules: Sequence[SkipRule]) -> str | None:
        """Why the run stops now, in words; None if it goes on."""
        if self.patience is None or (best := self.best) is None:
            return None
        if len(self.looks) - 1 - self.looks.index(best) >= self.patience:
            return f"the held-out loss was lowest after round {best.round}"
        if any(rule.is_done for rule in rules):
            return "most images are skipped by now"
        return None

    def ending(self, reason: str | None, round_: int) -> str:
        """Why the run has ended after a round, and which one is kept, in words.

        Args:
            reason: why it stopped; None if it took all steps.
        """
        assert self.best is not None
        kept = f"round {self.best.round} is kept"
        if reason is not None:
            return f"stopped after round {round_}: {reason}; {kept}"
        falling = len(self.looks) > 1 and self.best is self.looks[-1]
        more = "; the held-out loss was still falling, so longer training may help" if falling else ""
        return f"took all steps; {kept}{more}"

    def regret(self) -> str | None:
        """What the run missed by going on to the end, in words; None if nothing."""
        lowest = self.lowest
        if self.patience is not None or lowest is None or lowest is self.looks[-1]:
            return None
        return (
            f"the held-out loss was lowest after round {lowest.round} of {self.looks[-1].round}, but the last round "
            "is saved: `--stop_when auto` keeps the best one"
        )

    def forget(self, is_lost: Callable[[Look], bool]) -> None:
        """Forgets the best looks whose weights no longer exist."""
        while (best := self.best) is not None and is_lost(best):
            self.looks.remove(best)

    def state(self) -> list[list[Any]]:
        """What has been found, in types of JSON."""
        return [[look.round, look.step, look.loss] for look in self.looks]

    def load(self, manifest: Mapping[str, Any]) -> None:
        """Takes up what a checkpoint's manifest holds."""
        self.looks = [Look(*look) for look in manifest.get("looks", [])]
