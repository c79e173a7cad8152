"""Sums over the steps of a round: of losses, and of samples seen and skipped by noise level."""

import math
from typing import Any

import torch
from torch import Tensor, nn

NOISE_LEVELS = 10


class RoundMeter(nn.Module):
    """Sums over one clone's steps of a round, kept on its device and part of its checkpoint.

    Attributes:
        loss_sum: scalar, of unweighted per-sample losses that are finite.
        seen, skipped: (10,) fp32, samples by tenth of the noise schedule, from little noise to much.
        broken_step: scalar, number of the first step that was not finite, or -1.
    """

    loss_sum: Tensor
    seen: Tensor
    skipped: Tensor
    broken_step: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        # Apple's GPUs have no float64.
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.register_buffer("loss_sum", torch.zeros((), dtype=wide, device=device))
        self.register_buffer("seen", torch.zeros(NOISE_LEVELS, device=device))
        self.register_buffer("skipped", torch.zeros(NOISE_LEVELS, device=device))
        self.register_buffer("broken_step", torch.full((), -1, dtype=torch.int64, device=device))

    @torch.no_grad()
    def record(self, step: int, loss: Tensor, levels: Tensor, keep: Tensor, broken: Tensor) -> None:
        """Enters one step.

        Args:
            loss: (B,) per-sample losses; those that are not finite count as 0.
            levels: (B,) int64, tenth of the noise schedule.
            keep: (B,) bool.
            broken: scalar bool, whether the step was not finite.
        """
        self.loss_sum += torch.where(loss < math.inf, loss, 0.0).sum()
        self.seen.index_add_(0, levels, torch.ones_like(loss))
        self.skipped.index_add_(0, levels, (~keep).to(loss.dtype))
        self.broken_step.copy_(torch.where(broken & (self.broken_step < 0), step, self.broken_step))

    def read(self) -> "RoundSums":
        """The sums on the host: one synchronisation."""
        wide = self.loss_sum.dtype
        parts = [self.loss_sum[None], self.broken_step[None], self.seen, self.skipped]
        values = torch.cat([part.to(wide) for part in parts]).tolist()
        return RoundSums(values[0], int(values[1]), values[2 : 2 + NOISE_LEVELS], values[2 + NOISE_LEVELS :])

    def clear(self) -> None:
        """Back to the start of a round."""
        for buffer in (self.loss_sum, self.seen, self.skipped):
            buffer.zero_()
        self.broken_step.fill_(-1)


class RoundSums:
    """A meter's sums on the host; `combined` adds those of several clones, or leaves what came since."""

    def __init__(self, loss_sum: float, broken_step: int, seen: list[float], skipped: list[float]) -> None:
        self.loss_sum = loss_sum
        self.broken_step = broken_step
        self.seen = seen
        self.skipped = skipped

    @classmethod
    def nothing(cls) -> "RoundSums":
        """The sums of no steps."""
        return cls(0.0, -1, [0.0] * NOISE_LEVELS, [0.0] * NOISE_LEVELS)

    def combined(self, other: "RoundSums", sign: int = 1) -> "RoundSums":
        """Element-wise self + sign · other."""
        return RoundSums(
            self.loss_sum + sign * other.loss_sum,
            self.broken_step,
            [a + sign * b for a, b in zip(self.seen, other.seen, strict=True)],
            [a + sign * b for a, b in zip(self.skipped, other.skipped, strict=True)],
        )

    @property
    def numbers(self) -> list[Any]:
        """What `RoundSums(*numbers)` makes the same sums of, in plain types."""
        return [self.loss_sum, self.broken_step, self.seen, self.skipped]

    @property
    def loss(self) -> float:
        """Mean loss; NaN if nothing was seen."""
        return self.loss_sum / sum(self.seen) if sum(self.seen) else math.nan

    @property
    def skip_rate(self) -> float:
        """Share of samples that gave no gradient; 0 if nothing was seen."""
        return sum(self.skipped) / sum(self.seen) if sum(self.seen) else 0.0

    @property
    def skip_rate_by_level(self) -> list[float | None]:
        """The same by tenth of the noise schedule; None where nothing was seen."""
        return [s / n if n else None for s, n in zip(self.skipped, self.seen, strict=True)]
