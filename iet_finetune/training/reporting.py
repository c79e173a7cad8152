"""What a run tells while it goes on: progress, metrics by round, validation pictures, trackers."""

import sys
import time
from pathlib import Path
from typing import Any

from ..config.config import Config
from ..ensemble.clone import Clone
from ..ensemble.meter import RoundSums
from . import validation
from .assembly import Run
from .data import Data
from .model import Model
from .tracking import Progress, Trackers, append_line, cut_back, read_lines

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"


def warn(text: str) -> None:
    """One line of warning on the terminal."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Reporter:
    """Keeps the records of a run; begins with those of the rounds that are already done.

    Every rank has one and calls it in the same way; the main one alone writes, draws and speaks.

    Args:
        config: the run's settings.
        data, model, run: what it works with; read, and for pictures the merged weights are put into the live denoiser.
        same_pictures: whether the pictures that are there were drawn with the present settings.
    """

    def __init__(self, config: Config, data: Data, model: Model, run: Run, same_pictures: bool) -> None:
        self._config = config
        self._model = model
        self._run = run
        self._output = config.output_path
        self._speaks = run.ranks.is_main
        if self._speaks:
            for name in (METRICS, TIMINGS):
                cut_back(self._output / name, run.ensemble.round)
            # Pictures of rounds that are done again, or all if they were drawn in another way.
            validation.forget_rounds(self._output, run.ensemble.round if same_pictures else -1)
        self._trackers = Trackers(run.accelerator, config.logging.tracker_project_name, config.to_flags())
        self._step = run.ensemble.step
        self._progress = Progress(sum(data.schedule.total_steps), self._step, silent=not self._speaks)
        self._round_began = time.perf_counter()
        self._last = RoundSums.nothing()
        self._closed = False
        remaining = data.schedule.remaining_rounds(run.ensemble.steps)
        # All steps may be done and the merge not.
        self._rounds = run.ensemble.round + max(remaining, int(run.ensemble.in_midst_of_round))

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The metrics of the rounds done so far."""
        return read_lines(self._output / METRICS)

    def begin_clone(self, clone: Clone) -> None:
        """A clone starts or goes on: what its meter holds has been told already."""
        self._last = clone.meter.read()

    def step(self, total: int, samples: int) -> None:
        """All clones together have taken `total` steps, after `samples` images more."""
        self._step = total
        self._progress.reach(total, samples)

    def log(self, clone: Clone) -> RoundSums:
        """Reads the device once and tells what came since the last time; returns the clone's sums of the round."""
        sums = clone.meter.read()
        since, self._last = sums.combined(self._last, -1), sums
        ensemble = self._run.ensemble
        place = f"round {ensemble.round + 1}/{self._rounds} shard {clone.shard + 1}/{len(ensemble.clones)}"
        self._progress.describe(place, since.loss, since.skip_rate)
        rate = self._run.learning_rates[clone.shard](clone.step - 1)
        self._trackers.log({"loss": since.loss, "skip_rate": since.skip_rate, "lr": rate}, self._step)
        return sums

    def round(self, drift: float) -> None:
        """A round is merged: its line of metrics; the clones' meters start again. Every rank takes part."""
        ensemble = self._run.ensemble
        line = self._round_line(drift)
        for clone in ensemble.clones:
            clone.meter.clear()
        if not self._speaks:
            return
        append_line(self._output / METRICS, line)
        numbers = {f"round/{name}": value for name, value in line.items() if isinstance(value, float)}
        self._trackers.log(numbers, ensemble.step)
        self._progress.say(
            f"round {ensemble.round}/{self._rounds}: loss {line['loss']:.4f}, skipped {line['skip_rate']:.1%}"
        )
        now = time.perf_counter()
        append_line(self._output / TIMINGS, {"round": ensemble.round, "seconds": round(now - self._round_began, 3)})
        self._round_began = now

    def _round_line(self, drift: float) -> dict[str, Any]:
        clones = self._run.ensemble.clones
        own = [(clone.shard, clone.drift, clone.meter.read().numbers) for clone in self._run.ensemble.own]
        told = sorted(facts for rank in self._run.ranks.all_gather_object(own) for facts in rank)
        sums = [RoundSums(*numbers) for _, _, numbers in told]
        total = sums[0]
        for other in sums[1:]:
            total = total.combined(other)
        return {
            "round": self._run.ensemble.round,
            "step": self._run.ensemble.step,
            "loss": total.loss,
            "skip_rate": total.skip_rate,
            "skip_rate_by_noise_level": total.skip_rate_by_level,
            "merge_drift": drift,
            **self._run.ensemble.facts_of_merge,
            "clone_drift": [drift for _, drift, _ in told],
            "shard_loss": [shard.loss if sum(shard.seen) else None for shard in sums],
            "shard_skip_rate": [shard.skip_rate for shard in sums],
            "lr": [self._run.learning_rates[clone.shard](max(clone.step - 1, 0)) for clone in clones],
        }

    def draw_base(self) -> None:
        """Pictures from the pipeline as it came; to be called while the live denoiser still holds its weights."""
        self._draw(0)

    def draw_round(self) -> None:
        """Pictures from the merged denoiser of the round just done, when they are due."""
        round_ = self._run.ensemble.round
        if self._speaks and (round_ % self._config.validation.validation_rounds == 0 or round_ == self._rounds):
            self._run.ensemble.load_result()
            self._draw(round_)

    def _draw(self, round_: int) -> None:
        settings, path = self._config.validation, validation.round_file(self._output, round_)
        prompts = list(self._model.family.prompts(settings))
        if not self._speaks or not prompts or path.exists():
            return
        rows = validation.draw_images(
            self._model.family, settings, self._config.training.seed, self._config.data.resolution
        )
        validation.save_picture(validation.grid(rows, prompts), path)
        flat = [(picture, prompt) for row, prompt in zip(rows, prompts, strict=True) for picture in row]
        self._trackers.log_images("validation", [p for p, _ in flat], [c for _, c in flat], self._run.ensemble.step)

    def before_after(self) -> Path | None:
        """The picture that shows the first drawing beside the last; None if nothing was drawn."""
        return validation.save_before_after(self._output, self._rounds)

    def close(self) -> None:
        """Ends the progress bar and writes out what the trackers hold; again, it does nothing."""
        self._progress.close()
        if not self._closed:
            self._trackers.close()
        self._closed = True
