"""A run, from load to save: tells the story, and leaves each part to the module that knows it."""

import atexit
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..config.config import Config
from ..distributed.groups import Ranks
from ..ensemble.clone import Clone
from ..ensemble.meter import RoundSums
from ..errors import UserError
from ..families.smoke import shrink
from ..files import FolderLock
from ..method.schedule import Step, Wave
from ..publish import outputs
from .callbacks import Callback, CheckpointFacts, ImagesFacts, RoundFacts
from .device_memory import out_of_memory_explained
from .finish import finish, save_round
from .interrupts import Interrupts, what_helps
from .model import hand_back
from .overview import doubt_of_rule
from .preparing import prepare
from .reporting import round_metrics, run_facts, step_facts
from .resuming import after_a_break, manifest_facts
from .run_page import RunPage
from .starting import start_accelerator
from .validation import merged_pipeline


class Trainer:
    """Fine-tunes one pipeline with IET-AGC: `Trainer(Config.from_flags(...)).train()`.

    Under `accelerate launch` or `torchrun` every rank has one. The output folder, which all ranks must see, is held
    for this trainer until `train` ends or the trainer is gone.

    Args:
        config: the settings; see `iet_finetune.config`.
        callbacks: are called while the run goes on; see `Callback`.
        pipeline: a loaded diffusers pipeline to train in place of one that the flags name. It is the one that is
            trained: `train` leaves it on the main rank with the trained weights, or with the trained adapter active
            where a LoRA file is saved, on the device and in the precision that it came in, with all parameters frozen
            but those that were trained. A `--prediction_type` is written into its scheduler.
        dataset: a `datasets.Dataset` with the columns that the flags name, in place of a source that they name.
        heldout_images: another one, of images that training is compared with, in place of `--holdout_data_dir`.

    Raises:
        UserError: whatever the user can mend, before training starts wherever that can be known.
    """

    def __init__(
        self,
        config: Config,
        callbacks: Sequence[Callback] = (),
        *,
        pipeline: Any = None,
        dataset: Any = None,
        heldout_images: Any = None,
    ) -> None:
        objects = {"pipeline": pipeline, "dataset": dataset, "heldout_images": heldout_images}
        config.check_sources(**{name: value is not None for name, value in objects.items()})
        if config.training.dry_run:
            raise UserError("`--dry_run` is for the commands: `iet_finetune.planning.plan.make_plan` makes a plan.")
        if config.training.smoke:
            self._smoke = tempfile.TemporaryDirectory(prefix="iet_finetune-smoke-")
            config = shrink(config, Path(self._smoke.name))
        resume = config.checkpoint.resume_from_checkpoint
        self.config = config
        self.output = config.output_path
        # What relative folders are relative to, also where a notebook moves on before it trains.
        self._started_in = Path.cwd()
        accelerator = start_accelerator(config)
        self.ranks = Ranks.join(config.training.ddp_timeout)
        self._lock: FolderLock | None = None
        self._interrupts = Interrupts(is_alone=self.ranks.size == 1)
        # Where the pipeline came from, if it is the caller's.
        self._home = getattr(pipeline, "device", None)
        self._callbacks: tuple[Callback, ...] = tuple(callbacks)
        self._phase = ""
        try:
            explained = out_of_memory_explained(config, None, lambda: self._phase)
            with self.ranks.report_errors_once(), explained:
                self._lock = outputs.claim_together(self.output, self.ranks, resuming=resume is not None)
                prepared = prepare(config, accelerator, self.ranks, objects, self._enter)
        except KeyboardInterrupt:
            self._release()
            raise KeyboardInterrupt(what_helps(config)) from None
        except BaseException:
            self._release()
            raise
        self.store, self.reporter, self.validation = prepared.store, prepared.reporter, prepared.validation
        self.data, self.model, self.run = prepared.data, prepared.model, prepared.run
        self.ensemble, self._total_rounds = self.run.ensemble, prepared.total_rounds
        doubt = doubt_of_rule(config, self.data.schedule, self.model.family)
        page = RunPage(config, self.data, self.run, doubt)
        self._callbacks = (self.reporter, page, *callbacks)
        self._wants_losses = any(callback.wants_losses for callback in callbacks)

    def train(self) -> Path:
        """Trains, saves, and returns the folder that `from_pretrained` loads, or `load_lora_weights` for LoRA."""
        try:
            with contextlib.chdir(self._started_in), self.ranks.report_errors_once():
                with out_of_memory_explained(self.config, self.store, lambda: self._phase):
                    self.train_rounds()
                self.finish()
                self._call("on_run_end", run_facts(self.data, self.run, self.output, self._total_rounds))
                self.ranks.leave()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(what_helps(self.config, self._started_in)) from None
        finally:
            self.reporter.close()
            self._release()
        # Not now: there may be another run in the same processes. And not after an error: ranks may be gone.
        atexit.register(self.run.accelerator.state.destroy_process_group)
        return self._started_in / self.output

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def train_rounds(self) -> None:
        """Iterative ensemble training: every round trains each clone on its shard and merges them.

        The ranks take the shards in waves, one shard per rank or group; within a wave no rank waits for another.
        """
        self._call("on_run_begin", run_facts(self.data, self.run, self.output, self._total_rounds))
        self._draw(0)
        if not self.ensemble.in_midst_of_round:
            self.save_round(again=False)
            self.draw()
        for _ in self.rounds():
            self._enter("looking")
            round_, rules = self.ensemble.round, [clone.rule for clone in self.ensemble.clones]
            self.run.lender.begin_round(rules, round_, self._total_rounds - round_)
            for shards in self.ensemble.pending_waves:
                self._enter("training")
                clone = self.ensemble.checkout(shards)
                self.train_locally(clone, wave := self._wave(shards))
                self._enter("merging")
                self.ensemble.collect(shards)
                due = wave.length in wave.checkpoints(self._checkpoint_every)
                if (due or self._interrupts.asked) and self.ensemble.in_midst_of_round:
                    self.save_checkpoint(self.ensemble.step)
                    self._interrupts.end_if_asked()
            drift = self.ensemble.merge()
            self.end_round(drift)
            self._enter("saving")
            self.save_checkpoint(self.ensemble.step)
            self._interrupts.end_if_asked()
            self.save_round(again=True)
            self.draw()
        self.keep_best()

    def rounds(self) -> Iterator[int]:
        """The numbers, from 1, of the rounds still to be done."""
        while self.ensemble.in_midst_of_round or (self._rounds_left and self._why_stop is None):
            yield self.ensemble.round + 1

    @property
    def _rounds_left(self) -> int:
        return self.data.schedule.remaining_rounds(self.ensemble.steps)

    @property
    def _why_stop(self) -> str | None:
        return self.run.stopping.reason([clone.rule for clone in self.ensemble.clones])

    def _wave(self, shards: list[int]) -> Wave:
        """How many steps each of the shards still takes in this round; the same on every rank."""
        steps = []
        for clone in (self.ensemble.clones[shard] for shard in shards):
            began = clone.began if self.ensemble.is_midway(clone.shard) else clone.step
            steps.append(self.data.schedule.round_end(clone.shard, began) - clone.step)
        return Wave(tuple(shards), tuple(steps), self.ensemble.step)

    def train_locally(self, clone: Clone | None, wave: Wave) -> None:
        """Trains this rank's clone for its steps of this round, logging and writing checkpoints along the way.

        A checkpoint falls on the same step of every clone in the wave; a rank with no steps left writes its part at
        once.
        """
        due = [taken for taken in wave.checkpoints(self._checkpoint_every) if taken < wave.length]
        taken, stop = 0, self.data.schedule.round_end(clone.shard, clone.began) if clone is not None else 0
        before = clone.meter.read() if clone is not None else RoundSums.nothing()
        with self._interrupts.noted():
            for step in self._steps(clone, stop):
                assert clone is not None
                self.ranks.check()
                taken += 1
                logs = clone.step % self.config.logging.logging_steps == 0 or clone.step == stop
                # A group's device may wait for another one.
                with self.ranks.in_time():
                    sums = clone.meter.read() if logs or taken in due else None
                since = sums.combined(before, -1) if logs and sums is not None else None
                images = (wave.total(taken) - wave.total(taken - 1)) * (step.stop - step.start)
                facts = step_facts(self.data, self.run, clone, wave.total(taken), images, since, self._wants_losses)
                self._call("on_step_end", facts)
                if sums is not None and logs:
                    before = sums
                stops = self._interrupts.asked and taken < wave.length
                if sums is not None or stops:
                    self.stop_if_broken(clone, sums or clone.meter.read())
                if stops or taken in due:
                    self.save_checkpoint(wave.total(taken))
                if stops:
                    self._interrupts.end_if_asked()
        if clone is not None:
            self.run.local.park(clone)
        for later in (place for place in due if place > taken):
            self.save_checkpoint(wave.total(later))

    def _steps(self, clone: Clone | None, stop: int) -> Iterator[Step]:
        """Takes the clone's steps up to number `stop` one by one, and yields each once it is done."""
        if clone is not None:
            steps = self.data.schedule.steps(clone.shard, clone.step, stop)
            rates = self.run.learning_rates[clone.shard]
            taken = self.run.local.run(clone, self.data.shards[clone.shard], steps, rates)
            yield from taken if self.run.placement.group_size == 1 else self._in_time(taken)

    def _in_time(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Takes the steps of a group, none of which may wait for ever."""
        while True:
            with self.ranks.in_time():
                step = next(steps, None)
            if step is None:
                return
            yield step

    def end_round(self, drift: float) -> None:
        """Records the round that has just been merged; the clones' meters start again. Every rank takes part."""
        metrics = round_metrics(self.run, drift)
        self._enter("looking")
        heldout_loss = self.run.stopping.look(
            self.run.lender,
            self.model.family.objective,
            self.ensemble.round,
            self.ensemble.step,
            last=not self._rounds_left,
        )
        if heldout_loss is not None:
            metrics["heldout_loss"] = heldout_loss
        for clone in self.ensemble.clones:
            clone.meter.clear()
        pipeline = partial(merged_pipeline, self.ensemble, self.model.family) if self.ranks.is_main else None
        facts = RoundFacts(self.ensemble.step, self.ensemble.round, MappingProxyType(metrics), pipeline)
        self._call("on_round_end", facts)

    def keep_best(self) -> None:
        """Goes back to the round with the lowest held-out loss, if the run looks for it, and says why it ended."""
        best = self.run.stopping.best
        if best is None:
            return
        if self.ranks.is_main:
            print(self.run.stopping.ending(self._why_stop, self.ensemble.round), flush=True)
        if best.step != self.ensemble.step:
            self.ranks.barrier()
            self.ensemble.restore(self.store.open(self.store.path(best.step)))
        if self.validation.is_missing(best.round):
            self.ensemble.load_result()
            self._draw(best.round)

    def save_round(self, *, again: bool) -> None:
        """Saves what the merged round made, if `--save_every_rounds` asks for it; twice only if `again`."""
        if self.ranks.is_main:
            save_round(self.config, self.data, self.model, self.run, again=again)

    def draw(self) -> None:
        """Draws validation images with the merged denoiser, if they are due in this round."""
        if self.validation.is_due(self.ensemble.round):
            self.ensemble.load_result()
            self._draw(self.ensemble.round)

    def _draw(self, round_: int) -> None:
        if not self.validation.is_missing(round_):
            return
        self._enter("drawing")
        file = self.validation.draw(round_, self.ensemble.step)
        if file is not None:
            self._call("on_images", ImagesFacts(round_, file))

    def stop_if_broken(self, clone: Clone, sums: RoundSums) -> None:
        """Ends a run whose loss or gradient was not finite, with good weights saved.

        Broken steps changed no weight, but a finite step before them may have driven the weights too far. So the start
        of this clone's round is saved, unless a checkpoint has been written since. With several ranks, whose other
        clones are in the middle of their rounds, the newest checkpoint is kept instead.

        Raises:
            UserError: says where it happened and what to try.
        """
        if sums.broken_step < 0:
            return
        if self.ensemble.set_back() and not self.store.has(self.ensemble.step):
            self.save_checkpoint(self.ensemble.step, keep_older=True)
        raise UserError(
            f"the loss or gradient was not finite in round {self.ensemble.round + 1}, shard {clone.shard + 1} of "
            f"{len(self.ensemble.clones)}, step {sums.broken_step + 1}. {after_a_break(self.store)}."
        )

    @property
    def _checkpoint_every(self) -> int:
        return self.config.checkpoint.checkpointing_steps

    def save_checkpoint(self, step: int, *, keep_older: bool = False) -> Path:
        """Writes this rank's part of the checkpoint after `step` steps of all clones.

        Without groups no rank waits here for another.

        Returns:
            the checkpoint's folder, which is there once all ranks have written their parts.
        """
        if self.ensemble.live is not None:
            self.run.local.park(self.ensemble.live)
        facts = {"position": self.ensemble.position(), **manifest_facts(self.config, self.run)}
        pieces, best = self.ensemble.pieces() | self.run.lender.pieces(), self.run.stopping.best
        of_best = self.store.path(best.step) if best is not None else None
        needed = [path for path in (self.ensemble.needed, of_best) if path is not None]
        path = self.store.save(step, pieces, facts, keep_older=keep_older, needed=needed)
        if self.run.placement.group_size > 1:
            # The others of a group must not wait in a collective for the one that writes.
            self.ranks.barrier()
        self._call("on_checkpoint", CheckpointFacts(step, path))
        return path

    def finish(self) -> None:
        """Saves the pipeline, the ledger and the model card, and pushes them if asked to: rank 0 alone."""
        self.reporter.close()
        self.ranks.barrier()
        if self.ranks.is_main:
            if self.ranks.size > 1:
                # The clones of the other ranks as they are in the checkpoint after the round that is saved.
                self.ensemble.load_clones(self.store.open(self.store.path(self.ensemble.step)))
            pictures = self.validation.before_after(self.ensemble.round)
            finish(self.config, self.data, self.model, self.run, pictures, self._enter)
            if self._home is not None:
                hand_back(self.model, self.run.accelerator, self._home)
        self.ranks.barrier()

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._call("on_phase", phase)

    def _call(self, event: str, facts: object) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(facts)
