"""The facts of a run as they come, and the run's own callback, which writes them down."""

import time
from pathlib import Path
from typing import Any

import torch

from ..ensemble.clone import Clone
from ..ensemble.meter import RoundSums
from .assembly import Run
from .callbacks import Callback, LoggedFacts, RoundFacts, RunFacts, SampleFacts, StepFacts
from .data import Data
from .tracking import Progress, Trackers, append_line, cut_back

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"


class Reporter(Callback):
    """Keeps the records of a run: progress bar, `metrics.jsonl`, `timings.jsonl`, trackers.

    Every rank has one; that of the main rank alone writes and prints.

    Args:
        output: the run's output folder.
        is_main: whether this is the main rank.
        trackers: which numbers are sent to.
    """

    def __init__(self, output: Path, is_main: bool, trackers: Trackers) -> None:
        self._output, self._is_main, self._trackers = output, is_main, trackers
        self._progress: Progress | None = None
        self._closed = False

    def on_run_begin(self, facts: RunFacts) -> None:
        """Cuts the records of rounds that are trained again, and starts the progress bar."""
        if self._is_main:
            for name in (METRICS, TIMINGS):
                cut_back(self._output / name, facts.round)
        self._progress = Progress(facts.total_steps, facts.step, silent=not self._is_main)
        self._num_shards, self._rounds = facts.num_shards, facts.total_rounds
        self._round_began = time.perf_counter()

    def on_step_end(self, facts: StepFacts) -> None:
        """Moves the progress bar; with logged facts, shows and tracks them."""
        assert self._progress is not None
        self._progress.reach(facts.step, facts.images)
        if (logged := facts.logged) is not None:
            place = f"round {facts.round}/{self._rounds} shard {facts.shard + 1}/{self._num_shards}"
            self._progress.describe(place, logged.loss, logged.skip_rate)
            values = {"loss": logged.loss, "skip_rate": logged.skip_rate, "lr": logged.learning_rate}
            curve = f"shard-{facts.shard}/" if self._num_shards > 1 else ""
            self._trackers.log_clone(values, curve, facts.clone_step, facts.step)

    def on_round_end(self, facts: RoundFacts) -> None:
        """Writes the round's lines of metrics and timings."""
        assert self._progress is not None
        self._progress.reach(facts.step, 0)
        if not self._is_main:
            return
        line = facts.metrics
        append_line(self._output / METRICS, dict(line))
        numbers = {f"round/{name}": value for name, value in line.items() if isinstance(value, float)}
        self._trackers.log(numbers, facts.step)
        self._progress.say(
            f"round {facts.round}/{self._rounds}: loss {line['loss']:.4f}, skipped {line['skip_rate']:.1%}"
        )
        now = time.perf_counter()
        append_line(self._output / TIMINGS, {"round": facts.round, "seconds": round(now - self._round_began, 3)})
        self._round_began = now

    def close(self) -> None:
        """Ends the progress bar and flushes the trackers; calling it again does nothing."""
        if self._progress is not None:
            self._progress.close()
        if not self._closed:
            self._trackers.close()
        self._closed = True


def round_metrics(run: Run, drift: float) -> dict[str, Any]:
    """The line of `metrics.jsonl` for the round that has just been merged. Every rank takes part.

    Args:
        drift: ‖θ' − θ‖ / ‖θ‖ of the merge.
    """
    ensemble = run.ensemble
    own = [(clone.shard, clone.drift, clone.meter.read().numbers) for clone in ensemble.own]
    gathered = sorted(facts for rank in run.ranks.all_gather_object(own) for facts in rank)
    sums = [RoundSums(*numbers) for _, _, numbers in gathered]
    total = sums[0]
    for other in sums[1:]:
        total = total.combined(other)
    return {
        "round": ensemble.round,
        "step": ensemble.step,
        "loss": total.loss,
        "skip_rate": total.skip_rate,
        "skip_rate_by_noise_level": total.skip_rate_by_level,
        "merge_drift": drift,
        **ensemble.facts_of_merge,
        "clone_drift": [drift for _, drift, _ in gathered],
        "shard_loss": [shard.loss if sum(shard.seen) else None for shard in sums],
        "shard_skip_rate": [shard.skip_rate for shard in sums],
        "lr": [run.learning_rates[clone.shard](max(clone.step - 1, 0)) for clone in ensemble.clones],
    }


def run_facts(data: Data, run: Run, output: Path, total_rounds: int) -> RunFacts:
    """Where the run stands."""
    return RunFacts(
        output=output,
        rank=run.ranks.rank,
        num_images=len(data.images),
        num_shards=len(data.shards),
        total_steps=sum(data.schedule.total_steps),
        total_rounds=total_rounds,
        step=run.ensemble.step,
        round=run.ensemble.round,
    )


def step_facts(
    data: Data, run: Run, clone: Clone, step: int, images: int, since: RoundSums | None, wants_losses: bool
) -> StepFacts:
    """The step that a clone has just taken.

    Args:
        step: steps of all clones together.
        images: in this step, over all clones that train at the same time.
        since: what to log, or None.
        wants_losses: whether to read the samples' losses from the device.
    """
    logged = None
    if since is not None:
        rate = run.learning_rates[clone.shard](clone.step - 1)
        logged = LoggedFacts(since.loss, since.skip_rate, rate)
    samples = _sample_facts(data, run, clone) if wants_losses else None
    return StepFacts(step, run.ensemble.round + 1, clone.shard, clone.step, images, logged, samples)


def _sample_facts(data: Data, run: Run, clone: Clone) -> SampleFacts:
    judged = run.local.judged
    assert judged is not None
    images = torch.from_numpy(data.indices[clone.shard])[judged.members.cpu()]
    return SampleFacts(images, judged.loss.cpu(), judged.timesteps.cpu(), judged.keep.cpu())
