"""Anti-gradient control as a skip rule."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .agc import AntiGradientControl
from .objective import Objective
from .rules import Samples, SkipRule


class AGCRule(SkipRule):
    """`--skip_rule agc`: anti-gradient control as the rule of one clone.

    Attributes:
        agc: the clone's loss bank, with an entry for each of `--agc_bins` noise levels.
    """

    def __init__(self, config: Any, **facts: Any) -> None:
        super().__init__(config, **facts)
        bins = config.agc_bins or self.objective.default_bins
        corrected = config.agc_bias_correction
        self.agc = AntiGradientControl(bins, config.agc_threshold, config.agc_decay, corrected).to(self.device)

    @property
    def is_off(self) -> bool:
        """With a threshold of 0 nothing is skipped."""
        return self.agc.threshold == 0

    @classmethod
    def doubt(cls, config: Any, objective: Objective, visits: int, images: int) -> str | None:
        """An entry of the bank knows what is usual after some 1/(1 - d) losses, and skips hardly anything before."""
        entries = config.agc_bins or objective.default_bins
        warm = 1 if config.agc_bias_correction else round(1 / (1 - config.agc_decay), 6)
        if config.agc_threshold == 0 or visits >= entries * warm:
            return None
        fewer = int(visits / warm / 4)
        remedy = f"`--agc_bins {fewer}` or " if fewer > 1 else ""
        return (
            f"AGC can hardly skip anything: each of the {entries} entries of a clone's loss bank sees "
            f"{visits / entries:.2g} losses in all, and needs {warm:.0f} to know what is usual. {remedy}"
            "`--agc_bias_correction` lets it act sooner."
        )

    @classmethod
    def outlook(cls, config: Any, objective: Objective, visits: int, images: int) -> str | None:
        """How many losses an entry of the bank sees."""
        entries = config.agc_bins or objective.default_bins
        if config.agc_threshold == 0:
            return None
        return f"each of the {entries} entries of a clone's loss bank sees {visits / entries:.3g} losses"

    def _bins(self, samples: Samples) -> Tensor:
        return samples.level(len(self.agc.bank))

    def keep(self, samples: Samples) -> Tensor:
        """As `AntiGradientControl.keep_mask`."""
        if self.is_off:
            return torch.ones_like(samples.loss, dtype=torch.bool)
        return self.agc.keep_mask(samples.loss, self._bins(samples))

    def update(self, samples: Samples) -> None:
        """As `AntiGradientControl.update`."""
        self.agc.update(samples.loss, self._bins(samples))

    def expected_loss(self, samples: Samples) -> Tensor:
        """As `AntiGradientControl.expected_loss`."""
        return self.agc.expected_loss(self._bins(samples))

    def state_dict(self) -> dict[str, Any]:
        """The bank and its counts."""
        return self.agc.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the bank and its counts."""
        self.agc.load_state_dict(state)
