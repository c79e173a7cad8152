"""A run, from load to save: tells the story and leaves every part of it to the room that knows it."""

import atexit
import dataclasses
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..audit.flags import check_audit
from ..config.config import Config
from ..config.identity import check_identity, free_settings
from ..distributed.groups import Ranks
from ..ensemble.checkpoint import Checkpoint, CheckpointStore
from ..ensemble.clone import Clone
from ..ensemble.ledger import LEDGER, write_ledger
from ..ensemble.meter import RoundSums
from ..environment import differences, environment
from ..errors import UserError
from ..families.smoke import shrink
from ..files import FolderLock
from ..method.schedule import Step, Wave
from ..publish import outputs
from ..publish.card import CardFacts, base_license, write_model_card
from ..publish.hub import check_push, push
from ..publish.result import Result
from .assembly import assemble
from .reporting import Reporter, warn
from .starting import start_accelerator


class Trainer:
    """Fine-tunes one pipeline with IET-AGC: `Trainer(Config.from_flags(...)).train()`.

    Under `accelerate launch` or `torchrun` every rank has one. The output folder, which all ranks must see, is held
    for this trainer until `train` ends or the trainer is gone.

    Args:
        config: the settings; see `iet_finetune.config`.

    Raises:
        UserError: whatever the user can mend, before training starts wherever that can be known.
    """

    def __init__(self, config: Config) -> None:
        config.check_sources()
        if config.training.smoke:
            self._smoke = tempfile.TemporaryDirectory(prefix="iet_finetune-smoke-")
            config = shrink(config, Path(self._smoke.name))
        resume = config.checkpoint.resume_from_checkpoint
        self.config = config
        self.output = config.output_path
        accelerator = start_accelerator(config)
        self.ranks = Ranks.join(config.training.ddp_timeout)
        self._lock: FolderLock | None = None
        try:
            with self.ranks.report_errors_once():
                self._lock = outputs.claim_together(self.output, self.ranks, resuming=resume is not None)
                self._prepare(accelerator, resume)
        except BaseException:
            self._release()
            raise

    def train(self) -> Path:
        """Trains, saves, and returns the folder that `from_pretrained` loads, or `load_lora_weights` for LoRA."""
        try:
            with self.ranks.report_errors_once():
                self.train_rounds()
                self.finish()
                self.ranks.leave()
        finally:
            self.reporter.close()
            self._release()
        # Not now: there may be another run in the same processes. And not after an error: ranks may be gone.
        atexit.register(self.run.accelerator.state.destroy_process_group)
        return self.output

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def train_rounds(self) -> None:
        """Iterative ensemble training: every round trains each clone on its shard and merges them.

        The ranks take the shards in waves, one each or one a group; between a wave's ends none waits for another.
        """
        self.reporter.draw_base()
        if not self.ensemble.in_midst_of_round:
            self.reporter.draw_round()
        for _ in self.rounds():
            for shards in self.ensemble.pending_waves:
                clone = self.ensemble.checkout(shards)
                self.train_locally(clone, wave := self._wave(shards))
                self.ensemble.collect(shards)
                self.reporter.step(self.ensemble.step, 0)
                if wave.length in wave.checkpoints(self._checkpoint_every) and self.ensemble.in_midst_of_round:
                    self.save_checkpoint(self.ensemble.step)
            drift = self.ensemble.merge()
            self.reporter.round(drift)
            self.save_checkpoint(self.ensemble.step)
            self.reporter.draw_round()

    def rounds(self) -> Iterator[int]:
        """The numbers, from 1, of the rounds still to be done."""
        while self.ensemble.in_midst_of_round or self.schedule.remaining_rounds(self.ensemble.steps):
            yield self.ensemble.round + 1

    def _wave(self, shards: list[int]) -> Wave:
        """How many steps each of the shards still takes in this round; the same on every rank."""
        steps = []
        for clone in (self.ensemble.clones[shard] for shard in shards):
            began = clone.began if self.ensemble.is_midway(clone.shard) else clone.step
            steps.append(self.schedule.round_end(clone.shard, began) - clone.step)
        return Wave(tuple(shards), tuple(steps), self.ensemble.step)

    def train_locally(self, clone: Clone | None, wave: Wave) -> None:
        """Takes this rank's clone through its steps of this round, logging and writing checkpoints on the way.

        A checkpoint falls on the same steps of all the wave's clones; a rank that has no more writes its part at once.
        """
        due = [taken for taken in wave.checkpoints(self._checkpoint_every) if taken < wave.length]
        taken, stop = 0, self.schedule.round_end(clone.shard, clone.began) if clone is not None else 0
        for step in self._steps(clone, stop):
            assert clone is not None
            self.ranks.check()
            taken += 1
            before, total = wave.total(taken - 1), wave.total(taken)
            self.reporter.step(total, (total - before) * (step.stop - step.start))
            if clone.step % self.config.logging.logging_steps == 0 and clone.step < stop:
                self.stop_if_broken(clone, self.reporter.log(clone))
            if taken in due:
                self.stop_if_broken(clone, clone.meter.read())
                self.save_checkpoint(total)
        if clone is not None:
            self.run.local.park(clone)
        if clone is not None and taken:
            self.stop_if_broken(clone, self.reporter.log(clone))
        for later in (place for place in due if place > taken):
            self.save_checkpoint(wave.total(later))

    def _steps(self, clone: Clone | None, stop: int) -> Iterator[Step]:
        """Takes the clone's steps up to number `stop` one after the other; yields each when it is done."""
        if clone is None:
            return
        self.reporter.begin_clone(clone)
        steps = self.schedule.steps(clone.shard, clone.step, stop)
        shard, rates = self.data.shards[clone.shard], self.run.learning_rates[clone.shard]
        yield from self.run.local.run(clone, shard, steps, rates)

    def stop_if_broken(self, clone: Clone, sums: RoundSums) -> None:
        """Ends a run whose loss or gradient was not finite, with good weights saved.

        Broken steps changed no weight, but a finite step before them may have driven the weights too far. So what is
        saved is the start of this clone's round, unless a checkpoint written since then stands. With several ranks,
        whose other clones are in the midst of theirs, it is the newest checkpoint that stands.

        Raises:
            UserError: says where it happened and what to try.
        """
        if sums.broken_step < 0:
            return
        if self.ensemble.set_back() and not self.store.has(self.ensemble.step):
            self.save_checkpoint(self.ensemble.step, keep_older=True)
        raise UserError(
            f"the loss or gradient was not finite in round {self.ensemble.round + 1}, shard {clone.shard + 1} of "
            f"{len(self.ensemble.clones)}, step {sums.broken_step + 1}. {self._after_a_break()}."
        )

    def _after_a_break(self) -> str:
        advice = "lower `--learning_rate` or use `--mixed_precision no`"
        if not (saved := self.store.all()):
            return f"Nothing was saved yet: {advice}, and start anew in another `--output_dir`"
        *older, newest = saved
        go_back = f"; if that breaks too, with `--resume_from_checkpoint {older[-1].name}`" if older else ""
        return (
            f"The last good weights are saved in {newest}: {advice}, and go on with "
            f"`--resume_from_checkpoint latest`{go_back}"
        )

    @property
    def _checkpoint_every(self) -> int:
        return self.config.checkpoint.checkpointing_steps

    def save_checkpoint(self, step: int, *, keep_older: bool = False) -> Path:
        """Writes down where this rank stands, as its part of the checkpoint after `step` steps of all clones.

        Without groups no rank waits here for another.

        Returns:
            the checkpoint's folder, which is there once all ranks have written their parts.
        """
        if self.ensemble.live is not None:
            self.run.local.park(self.ensemble.live)
        facts = {
            "position": self.ensemble.position(),
            "identity": self.run.identity,
            "settings": self._settings(),
            "pictures": self._pictures(),
            "environment": environment(),
        }
        pieces, needed = self.ensemble.pieces(), self.ensemble.needed
        path = self.store.save(step, pieces, facts, keep_older=keep_older, needed=needed)
        if self.run.placement.group_size > 1:
            # The others of a group must not wait in a collective for the one that writes.
            self.ranks.barrier()
        return path

    def finish(self) -> None:
        """Saves the pipeline, the ledger and the model card, and pushes them if asked to: rank 0 alone."""
        self.ranks.barrier()
        if self.ranks.is_main:
            self._finish()
        self.ranks.barrier()

    def _finish(self) -> None:
        self._gather_clones()
        self.ensemble.load_result()
        result = Result(
            self.model.family,
            self.model.adapter,
            self.model.source,
            self.data.images.classes is not None,
            self.run.accelerator,
            self.config,
        )
        with outputs.audit_of_other_weights_removed(self.output):
            outputs.publish(self.output, result.save)
        data, ledgers = self.data, [clone.ledger for clone in self.ensemble.clones]
        write_ledger(self.output / LEDGER, data.images, data.heldout, data.indices, ledgers)
        picture = self.reporter.before_after()
        write_model_card(self.output, self._card_facts(picture, result))
        self.reporter.close()
        self._print_summary(picture, result)
        if self.config.audit.audit:
            self._audit()
        if self.config.hub.push_to_hub:
            print(f"pushed to {push(self.output, self.config.hub)}")

    def _audit(self) -> None:
        """Measures what was saved, loaded as a user loads it, and puts the figures into the card."""
        self.model.family.pipeline.to("cpu")
        self.ensemble.release()
        # Packages that only an audit needs are imported where there is one.
        from ..publish.audited import audit_model

        try:
            print(audit_model(self.output, self.run.accelerator.device), flush=True)
        except UserError as error:
            raise UserError(
                f"{error} The finished pipeline is saved in `{self.output}`; audit it with: "
                f"iet-finetune audit --model {shlex.quote(str(self.output))}"
            ) from None

    def _gather_clones(self) -> None:
        """The clones of the other ranks as they stand in the checkpoint that every run ends with."""
        if self.ranks.size > 1:
            self.ensemble.load_clones(self.store.open(self.store.all()[-1]))

    def _prepare(self, accelerator: Accelerator, resume: str | None) -> None:
        if self.config.hub.push_to_hub and self.ranks.is_main:
            check_push(self.output, self.config.hub)
        if self.config.audit.audit and self.ranks.is_main:
            check_audit(self.config)
        self.store = CheckpointStore(self.output, self.config.checkpoint.checkpoints_total_limit, self.ranks)
        checkpoint = self._checkpoint(resume)
        self.data, self.model, self.run = assemble(self.config, accelerator, self.ranks)
        self.ensemble, self.schedule = self.run.ensemble, self.data.schedule
        same_pictures = checkpoint is not None and checkpoint.manifest["pictures"] == self._pictures()
        if checkpoint is not None:
            self._take_up(checkpoint)
        if self.ranks.is_main:
            self._prepare_folder(checkpoint)
        self.ranks.barrier()
        self.reporter = Reporter(self.config, self.data, self.model, self.run, same_pictures)

    def _checkpoint(self, resume: str | None) -> Checkpoint | None:
        """The checkpoint to go on from, which rank 0 looks for and all open."""
        found = self.store.find(resume) if resume is not None and self.ranks.is_main else None
        path = self.ranks.all_gather_object(str(found.path) if found is not None else None)[0]
        return found if found is not None or path is None else self.store.open(Path(path))

    def _prepare_folder(self, checkpoint: Checkpoint | None) -> None:
        self._check_space()
        if idle := self.run.placement.idle():
            warn(
                f"`--num_shards {len(self.ensemble.clones)}` on {self.ranks.size} ranks: "
                f"{', '.join(f'rank {rank}' for rank in idle)} will have nothing to do in the last part of every round"
            )
        if self.config.logging.report_to != "none":
            outputs.make_logging_folder(self.output / self.config.logging.logging_dir)
        if checkpoint is not None:
            self.store.go_back_to(checkpoint)
        outputs.write_config(self.output, self.config)

    def _take_up(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.manifest
        check_identity(saved["identity"], self.run.identity, str(checkpoint.path))
        changed = differences(saved["settings"], self._settings())
        for line in changed + differences(saved["environment"], environment()):
            if self.ranks.is_main:
                warn(f"resuming, but {line}: the weights may differ from those of a run without a stop")
        self.ensemble.restore(checkpoint)
        if any(done > total for done, total in zip(self.ensemble.steps, self.schedule.total_steps, strict=True)):
            raise UserError(
                f"cannot resume from {checkpoint.path}: it is {max(self.ensemble.steps)} steps of a clone into the run"
                ", and `--num_train_epochs` or `--max_train_steps` ask for fewer. Raise them, or choose an older one."
            )

    def _settings(self) -> dict[str, Any]:
        return free_settings(self.config, self.run.accelerator.mixed_precision)

    def _pictures(self) -> dict[str, Any]:
        settings = self.config.validation
        return {**dataclasses.asdict(settings), "validation_prompts": list(settings.validation_prompts)}

    def _check_space(self) -> None:
        components = self.model.family.pipeline.components.values()
        models = [component for component in components if isinstance(component, torch.nn.Module)]
        pipeline = sum(parameter.nbytes for model in models for parameter in model.parameters())
        outputs.check_space(self.output, self.run.need.checkpoint + pipeline)

    def _card_facts(self, picture: Path | None, result: Result) -> CardFacts:
        return CardFacts(
            base_model=self.config.model.pretrained_model_name_or_path,
            base_license=base_license(self.model.source.folder) if self.model.source.folder is not None else None,
            pipeline_class=self.model.source.class_name,
            flags=self.config.to_flags(),
            num_images=len(self.data.images),
            num_distinct_images=len(self.data.images) - self.data.images.num_duplicates,
            num_heldout=len(self.data.heldout),
            rounds=self.ensemble.round,
            steps=self.ensemble.step,
            skip_rates=tuple(line["skip_rate"] for line in self.reporter.lines),
            sample_grid=picture.relative_to(self.output).as_posix() if picture is not None else None,
            versions=environment()["versions"],
            lora_export=result.words,
            class_names=self.data.images.class_names,
            absent=self.model.source.absent,
        )

    def _print_summary(self, picture: Path | None, result: Result) -> None:
        rates = " ".join(f"{line['skip_rate']:.1%}" for line in self.reporter.lines)
        print(f"skipped by round: {rates}")
        if picture is not None:
            print(f"before and after: {picture}")
        if result.words is not None:
            print(f"saved as {result.words}")
        print(f"load it with: {result.how_to_load(self.output)}", flush=True)
