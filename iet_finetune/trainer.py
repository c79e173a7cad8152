"""A run, from load to save: tells the story and leaves every part of it to the room that knows it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from . import outputs
from .assembly import build_parts, start_accelerator
from .card import CardFacts, base_license, write_model_card
from .checkpoint import Checkpoint, CheckpointStore
from .config import Config
from .ensemble import Clone
from .errors import UserError
from .families import save_pipeline
from .hub import check_push, push
from .identity import check_identity, differences, environment, free_settings
from .ledger import write_ledger
from .reporting import Reporter, warn
from .tracking import RoundSums

LEDGER = "ledger.parquet"


class Trainer:
    """Fine-tunes one pipeline with IET-AGC: `Trainer(Config.from_flags(...)).train()`.

    The output folder is held for this trainer until `train` ends or the trainer is gone.

    Args:
        config: the settings; see `iet_finetune.config`.

    Raises:
        UserError: whatever the user can mend, before training starts wherever that can be known.
    """

    def __init__(self, config: Config) -> None:
        config.check_sources()
        resume = config.checkpoint.resume_from_checkpoint
        self.config = config
        self.output = config.output_path
        accelerator = start_accelerator(config)
        self._lock = outputs.claim(self.output, resuming=resume is not None)
        try:
            self._prepare(accelerator, resume)
        except BaseException:
            self._lock.release()
            raise

    def train(self) -> Path:
        """Trains, saves, and returns the folder that `DiffusionPipeline.from_pretrained` loads."""
        try:
            self.train_rounds()
            return self.finish()
        finally:
            self.reporter.close()
            self._lock.release()

    def train_rounds(self) -> None:
        """Iterative ensemble training: every round trains each clone on its shard and merges them."""
        self.reporter.draw_base()
        if not self.ensemble.in_midst_of_round:
            self.reporter.draw_round()
        for _ in self.rounds():
            for shard in self.ensemble.pending_shards:
                clone = self.ensemble.checkout(shard)
                self.train_locally(clone)
                self.ensemble.collect(clone)
                if self.checkpoint_is_due() and self.ensemble.in_midst_of_round:
                    self.save_checkpoint()
            drift = self.ensemble.merge()
            self.reporter.round(drift)
            self.save_checkpoint()
            self.reporter.draw_round()

    def rounds(self) -> Iterator[int]:
        """The numbers, from 1, of the rounds still to be done."""
        while self.ensemble.in_midst_of_round or self.schedule.remaining_rounds(self.ensemble.steps):
            yield self.ensemble.round + 1

    def train_locally(self, clone: Clone) -> None:
        """Takes the live clone through its steps of this round, logging and writing checkpoints on the way."""
        stop = self.schedule.round_end(clone.shard, clone.began)
        steps = self.schedule.steps(clone.shard, clone.step, stop)
        self.reporter.begin_clone(clone)
        shard, course = self.parts.shards[clone.shard], self.parts.courses[clone.shard]
        for step in self.parts.local.run(clone, shard, steps, course):
            self.reporter.step(step.stop - step.start)
            if clone.step % self.config.logging.logging_steps == 0 or clone.step == stop:
                self.stop_if_broken(clone, self.reporter.log(clone))
            if self.checkpoint_is_due() and clone.step < stop:
                self.stop_if_broken(clone, clone.meter.read())
                self.save_checkpoint()
        self.parts.local.park(clone)

    def stop_if_broken(self, clone: Clone, sums: RoundSums) -> None:
        """Ends a run whose loss or gradient was not finite, with good weights saved.

        Broken steps changed no weight, but a finite step before them may have driven the weights too far. So what is
        saved is the start of this clone's round, unless a checkpoint written since then stands.

        Raises:
            UserError: says where it happened and what to try.
        """
        if sums.broken_step < 0:
            return
        if self.ensemble.set_back() and not self.store.has(self.ensemble.step):
            self.save_checkpoint(keep_older=True)
        *older, newest = self.store.all()
        go_back = f"; if that breaks too, with `--resume_from_checkpoint {older[-1].name}`" if older else ""
        raise UserError(
            f"the loss or gradient was not finite in round {self.ensemble.round + 1}, shard {clone.shard + 1} of "
            f"{len(self.ensemble.clones)}, step {sums.broken_step + 1}. The last good weights are saved in {newest}: "
            "lower `--learning_rate` or use `--mixed_precision no`, and go on with `--resume_from_checkpoint latest`"
            f"{go_back}."
        )

    def checkpoint_is_due(self) -> bool:
        """Whether the steps of all clones together have reached a multiple of `--checkpointing_steps`."""
        return self.ensemble.step % self.config.checkpoint.checkpointing_steps == 0

    def save_checkpoint(self, *, keep_older: bool = False) -> Path:
        """Writes down where the run stands; returns the checkpoint's folder."""
        if self.ensemble.live is not None:
            self.parts.local.park(self.ensemble.live)
        facts = {
            "position": self.ensemble.position(),
            "identity": self.parts.identity,
            "settings": self._settings(),
            "pictures": self._pictures(),
            "environment": environment(),
        }
        return self.store.save(self.ensemble.step, self.ensemble.pieces(), facts, keep_older=keep_older)

    def finish(self) -> Path:
        """Saves the pipeline, the ledger and the model card, and pushes them if asked to."""
        self.reporter.load_result()
        outputs.publish(self.output, self._save_pipeline)
        parts, clones = self.parts, self.ensemble.clones
        ledgers = [clone.ledger for clone in clones]
        write_ledger(self.output / LEDGER, parts.images, parts.heldout, parts.indices, ledgers)
        picture = self.reporter.before_after()
        write_model_card(self.output, self._card_facts(picture))
        self.reporter.close()
        self._print_summary(picture)
        if self.config.hub.push_to_hub:
            print(f"pushed to {push(self.output, self.config.hub)}")
        return self.output

    def _prepare(self, accelerator: Accelerator, resume: str | None) -> None:
        if self.config.hub.push_to_hub:
            check_push(self.output, self.config.hub)
        self.store = CheckpointStore(self.output, self.config.checkpoint.checkpoints_total_limit)
        checkpoint = self.store.find(resume) if resume is not None else None
        self.parts = build_parts(self.config, accelerator)
        self.ensemble, self.schedule = self.parts.ensemble, self.parts.schedule
        same_pictures = checkpoint is not None and checkpoint.manifest["pictures"] == self._pictures()
        if checkpoint is not None:
            self._take_up(checkpoint)
        self._check_space()
        if self.config.logging.report_to != "none":
            outputs.make_logging_folder(self.output / self.config.logging.logging_dir)
        if checkpoint is not None:
            self.store.go_back_to(checkpoint)
        outputs.write_config(self.output, self.config)
        self.reporter = Reporter(self.config, self.parts, same_pictures)

    def _take_up(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.manifest
        check_identity(saved["identity"], self.parts.identity, str(checkpoint.path))
        changed = differences(saved["settings"], self._settings())
        for line in changed + differences(saved["environment"], environment()):
            warn(f"resuming, but {line}: the weights may differ from those of a run without a stop")
        self.ensemble.restore(checkpoint)
        if any(done > total for done, total in zip(self.ensemble.steps, self.schedule.total_steps, strict=True)):
            raise UserError(
                f"cannot resume from {checkpoint.path}: it is {max(self.ensemble.steps)} steps of a clone into the run"
                ", and `--num_train_epochs` or `--max_train_steps` ask for fewer. Raise them, or choose an older one."
            )

    def _settings(self) -> dict[str, Any]:
        return free_settings(self.config, self.parts.accelerator.mixed_precision)

    def _pictures(self) -> dict[str, Any]:
        settings = self.config.validation
        return {**dataclasses.asdict(settings), "validation_prompts": list(settings.validation_prompts)}

    def _check_space(self) -> None:
        weights = sum(tensor.nbytes for tensor in self.ensemble.denoiser.values())
        averages = 2 if self.config.optimizer.use_ema else 1
        sums = 2 if len(self.ensemble.clones) > 1 else 0
        moments = len(self.ensemble.clones) if self.config.ensemble.optimizer_across_rounds == "keep" else 1
        components = self.parts.family.pipeline.components.values()
        models = [component for component in components if isinstance(component, torch.nn.Module)]
        pipeline = sum(parameter.nbytes for model in models for parameter in model.parameters())
        # A checkpoint in the middle of a round: the round's start, the live clone, the sum in float64, the moments.
        outputs.check_space(self.output, (2 + sums) * weights * averages + 2 * weights * moments + pipeline)

    def _save_pipeline(self, folder: Path) -> None:
        family, dtypes = self.parts.family, dict(self.parts.source.dtypes)
        if self.config.model.save_dtype is not None:
            dtypes[family.denoiser_name] = getattr(torch, self.config.model.save_dtype)
        self.parts.accelerator.unwrap_model(family.denoiser, keep_fp32_wrapper=False)
        save_pipeline(family.pipeline, folder, dtypes, self.parts.source.classes)

    def _card_facts(self, picture: Path | None) -> CardFacts:
        return CardFacts(
            base_model=str(self.config.model.pretrained_model_name_or_path),
            base_license=base_license(self.parts.source.folder),
            pipeline_class=self.parts.source.class_name,
            flags=self.config.to_flags(),
            num_images=len(self.parts.images),
            num_distinct_images=len(self.parts.images) - self.parts.images.num_duplicates,
            num_heldout=len(self.parts.heldout),
            rounds=self.ensemble.round,
            steps=self.ensemble.step,
            skip_rates=tuple(line["skip_rate"] for line in self.reporter.lines),
            sample_grid=picture.relative_to(self.output).as_posix() if picture is not None else None,
            versions=environment()["versions"],
        )

    def _print_summary(self, picture: Path | None) -> None:
        rates = " ".join(f"{line['skip_rate']:.1%}" for line in self.reporter.lines)
        print(f"skipped by round: {rates}")
        if picture is not None:
            print(f"before and after: {picture}")
        print(f'load it with: DiffusionPipeline.from_pretrained("{self.output}")', flush=True)
