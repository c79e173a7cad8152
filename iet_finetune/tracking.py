"""What a run says of itself: sums by round on the device, metrics.jsonl, the progress bar, and trackers."""

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from .files import written_beside

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


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Adds one JSON line to a file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(values) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; an incomplete last line, as a killed process leaves it, does not count."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def cut_back(path: Path, rounds: int) -> None:
    """Removes the lines of rounds that a resumed run does again: those numbered above `rounds`."""
    kept = [line for line in read_lines(path) if line["round"] <= rounds]
    with written_beside(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


class Progress:
    """One progress bar over the steps of all clones; where there is no terminal, one line a round instead.

    `silent` is for the ranks that leave talking to another.
    """

    def __init__(self, total_steps: int, done: int, silent: bool = False) -> None:
        self._silent = silent
        self._terminal = sys.stderr.isatty() and not silent
        self._bar = tqdm(total=total_steps, initial=done, unit="step", disable=not self._terminal, dynamic_ncols=True)
        self._images = 0
        self._since = time.perf_counter()

    def reach(self, steps: int, samples: int) -> None:
        """All clones together have taken so many steps, after `samples` images more."""
        self._images += samples
        self._bar.update(steps - self._bar.n)

    def describe(self, place: str, loss: float, skip_rate: float) -> None:
        """Shows where the run stands and how fast it is."""
        if self._terminal:
            now = time.perf_counter()
            speed, self._images, self._since = self._images / max(now - self._since, 1e-9), 0, now
            self._bar.set_description(place, refresh=False)
            self._bar.set_postfix_str(f"loss {loss:.4f}, skipped {skip_rate:.1%}, {speed:.1f} images/s")

    def say(self, text: str) -> None:
        """One line that stays."""
        if self._terminal:
            self._bar.write(text, file=sys.stderr)
        elif not self._silent:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


class Trackers:
    """Accelerate's trackers, given only what they can take."""

    def __init__(self, accelerator: Accelerator, project: str, flags: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        # TensorBoard refuses lists and None in a configuration.
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in flags.items()}
        accelerator.init_trackers(project, plain)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step of all clones together."""
        self._accelerator.log(dict(values), step=step)

    def log_images(self, name: str, images: Iterable[Any], captions: list[str], step: int) -> None:
        """Pictures (PIL), to the trackers that show some."""
        import numpy as np

        pictures = list(images)
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                stacked = np.stack([np.asarray(picture) for picture in pictures])
                tracker.writer.add_images(name, stacked, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                import wandb

                named = [wandb.Image(p, caption=c) for p, c in zip(pictures, captions, strict=True)]
                tracker.log({name: named}, step=step)

    def close(self) -> None:
        """Writes out what is pending."""
        # Not `end_training`, which also takes down the process group: that may wait for ranks that are gone.
        for tracker in self._accelerator.trackers:
            tracker.finish()
