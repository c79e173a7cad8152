"""Skip rules for comparison: as many samples as AGC skips, but chosen by chance; and the guard by other clones."""

from dataclasses import dataclass

import torch

from iet_finetune import register_skip_rule
from iet_finetune.config.flags import flag
from iet_finetune.config.registry import SKIP_RULES
from iet_finetune.method.rules import Samples, SkipRule

from . import other_clones

NAME = "by_chance"


def register() -> None:
    """Lets `--skip_rule` choose them."""
    if NAME not in SKIP_RULES.entries:
        register_skip_rule(NAME)(ByChance)
    other_clones.register()


class ByChance(SkipRule):
    """Skips each sample with the same probability, whatever its loss."""

    @dataclass(frozen=True)
    class Config:
        """What the rule is set by."""

        chance_of_skipping: float = flag(
            0.0, "Probability that a sample gives no gradient.", resume="fixed", scope="public"
        )

    steps = 0

    def keep(self, samples: Samples) -> torch.Tensor:
        """(B,) bool; the same for the same step and images."""
        generator = torch.Generator().manual_seed(self.steps)
        drawn = torch.rand(self.num_images, generator=generator)[samples.members.cpu()]
        return (drawn >= self.config.chance_of_skipping).to(samples.loss.device)

    def update(self, samples: Samples) -> None:
        """Counts the steps."""
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        """How many steps the clone has taken."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there."""
        self.steps = state["steps"]
