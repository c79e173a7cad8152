"""A run, from load to save: tells the story and leaves every part of it to the room that knows it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration

from . import outputs, validation
from .adapters import Trainable, weights_fingerprint
from .agc import AntiGradientControl
from .card import CardFacts, base_license, write_model_card
from .checkpoint import CheckpointStore
from .config import Config
from .data.dataset import load_images
from .data.loader import Shard
from .data.transforms import ImageTransform
from .ema import EMA
from .ensemble import Clone, Ensemble
from .errors import UserError
from .families import find_pipeline, load_family, save_pipeline
from .identity import check_identity, differences, environment, free_settings, run_identity
from .ledger import ShardLedger, write_ledger
from .local import LocalTraining
from .optimizers import build_optimizer, learning_rate_course
from .schedule import Schedule
from .sharding import shard_indices
from .tracking import Progress, RoundMeter, RoundSums, Trackers, append_line, cut_back, read_lines

METRICS, TIMINGS, LEDGER = "metrics.jsonl", "timings.jsonl", "ledger.parquet"


class Trainer:
    """Fine-tunes one pipeline with IET-AGC: `Trainer(Config.from_flags(...)).train()`.

    Args:
        config: the settings; see `iet_finetune.config`.

    Raises:
        UserError: whatever the user can mend, before training starts wherever that can be known.
    """

    def __init__(self, config: Config) -> None:
        config.check_sources()
        self.config = config
        self.output = config.output_path
        outputs.claim(self.output, resuming=config.checkpoint.resume_from_checkpoint is not None)
        self.store = CheckpointStore(self.output, config.checkpoint.checkpoints_total_limit)
        self.store.clean()
        self.checkpoint = self._find_checkpoint()
        self.accelerator = self._start_accelerator()
        self.source = find_pipeline(config.model)
        self._load_data()
        self._load_model()
        self._build_ensemble()
        self._resume()

    # --- the story ---------------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Trains, saves, and returns the folder that `DiffusionPipeline.from_pretrained` loads."""
        self._before_training()
        for round_ in self.rounds():
            for shard in self.ensemble.pending_shards:
                clone = self.ensemble.checkout(shard)
                self.train_locally(clone)
                self.ensemble.collect(clone)
                self._checkpoint_between_clones()
            drift = self.ensemble.merge()
            self._after_round(round_, drift)
        return self._finish()

    def rounds(self) -> Iterator[int]:
        """The numbers, from 1, of the rounds still to be done."""
        while self.ensemble.round < self.schedule.rounds:
            yield self.ensemble.round + 1

    def train_locally(self, clone: Clone) -> None:
        """Takes the live clone through its steps of this round, logging and writing checkpoints on the way."""
        _, stop = self.schedule.span(clone.shard, self.ensemble.round)
        steps = self.schedule.steps(clone.shard, clone.step, stop)
        self._read_so_far = clone.meter.read()
        for step in self.local.run(clone, self.shards[clone.shard], steps, self.courses[clone.shard]):
            self.progress.advance(step.stop - step.start)
            if clone.step % self.config.logging.logging_steps == 0 or clone.step == stop:
                self._log(clone)
            if self._checkpoint_is_due() and clone.step < stop:
                self._stop_if_broken(clone, clone.meter.read())
                self._save_checkpoint()

    # --- building ----------------------------------------------------------------------------------------------------

    def _find_checkpoint(self) -> Any:
        wanted = self.config.checkpoint.resume_from_checkpoint
        return self.store.find(wanted) if wanted is not None else None

    def _start_accelerator(self) -> Accelerator:
        report_to = self.config.logging.report_to
        available = [str(tracker.value) for tracker in get_available_trackers()]
        if report_to not in ("none", "all", *available):
            raise UserError(f"`--report_to {report_to}` needs the package {report_to}: `pip install {report_to}`.")
        try:
            accelerator = Accelerator(
                gradient_accumulation_steps=1,
                mixed_precision=self.config.training.mixed_precision,
                log_with=None if report_to == "none" else report_to,
                project_config=ProjectConfiguration(
                    project_dir=str(self.output), logging_dir=str(self.output / self.config.logging.logging_dir)
                ),
            )
        except ValueError as error:
            raise UserError(f"`--mixed_precision {self.config.training.mixed_precision}`: {error}") from None
        if accelerator.num_processes > 1:
            raise UserError(f"training runs in one process, not {accelerator.num_processes}: use `--num_processes 1`.")
        if self.config.training.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        return accelerator

    def _load_data(self) -> None:
        config, seed = self.config, self.config.training.seed
        self.images, self.heldout = load_images(
            config.data,
            cache_dir=config.model.cache_dir,
            seed=seed,
            shard_by_column=config.ensemble.shard_by_column,
        )
        self.indices = shard_indices(len(self.images), config.ensemble.num_shards, seed, self.images.shard_labels)
        sizes = tuple(len(indices) for indices in self.indices)
        self.schedule = Schedule.plan(sizes, config.training, config.ensemble)

    def _load_model(self) -> None:
        config = self.config
        self.family = load_family(self.source, config.model)
        latent_shape = self.family.latent_shape(config.data.resolution)
        self.family.place(self.accelerator.device)
        denoiser = self.family.denoiser
        if config.training.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        denoiser.train()
        # Evaluation mode gives placement and autocast without DistributedDataParallel, which would average clones.
        self.accelerator.prepare_model(denoiser, evaluation_mode=True)
        transform = ImageTransform(
            config.data.resolution,
            center_crop=config.data.center_crop,
            interpolation=config.data.image_interpolation_mode,
            seed=config.training.seed,
        )
        self.shards = [
            Shard(
                self.images,
                indices,
                transform,
                config.data,
                number=number,
                seed=config.training.seed,
                latent_shape=latent_shape,
                noise_offset=config.training.noise_offset,
            )
            for number, indices in enumerate(self.indices)
        ]

    def _build_ensemble(self) -> None:
        config, device = self.config, self.accelerator.device
        self.trainable = Trainable(self.family.denoiser)
        parameters = self.trainable.parameters
        optimizer = build_optimizer(parameters.values(), config.optimizer, config.training)
        base_rate = optimizer.param_groups[0]["lr"]
        self.courses = [learning_rate_course(config.optimizer, n, base_rate) for n in self.schedule.total_steps]
        ema = EMA(parameters, config.optimizer.ema_max_decay) if config.optimizer.use_ema else None
        self.ensemble = Ensemble(
            self.trainable,
            optimizer,
            ema,
            [self._new_clone(shard, device) for shard in range(config.ensemble.num_shards)],
            keep_moments=config.ensemble.optimizer_across_rounds == "keep",
            seed=config.training.seed,
        )
        self.local = LocalTraining(
            self.family, self.trainable, optimizer, ema, config, device, self.accelerator.scaler
        )
        self.identity = run_identity(config, self.images.fingerprint, weights_fingerprint(self.ensemble.denoiser))

    def _new_clone(self, shard: int, device: torch.device) -> Clone:
        size = len(self.indices[shard])
        agc = self.config.agc
        return Clone(
            shard,
            size if self.config.ensemble.merge_weighting == "samples" else 1,
            AntiGradientControl(len(self.family.schedule), agc.agc_threshold, agc.agc_decay).to(device),
            ShardLedger(size).to(device),
            RoundMeter(device),
        )

    def _resume(self) -> None:
        if self.checkpoint is None:
            return
        facts = self.checkpoint.manifest
        check_identity(facts["identity"], self.identity, str(self.checkpoint.path))
        changed = differences(facts["settings"], free_settings(self.config))
        changed += differences(facts["environment"], environment())
        for line in changed:
            self._warn(f"resuming, but {line}: the weights may differ from those of an uninterrupted run")
        self.local.load_state(self.ensemble.restore(self.checkpoint))

    # --- on the way --------------------------------------------------------------------------------------------------

    def _before_training(self) -> None:
        self._needed_space()
        for name in (METRICS, TIMINGS):
            cut_back(self.output / name, self.ensemble.round)
        outputs.write_config(self.output, self.config)
        self.trackers = Trackers(self.accelerator, self.config.logging.tracker_project_name, self.config.to_flags())
        self.progress = Progress(sum(self.schedule.total_steps), self.ensemble.step)
        self._round_began = time.perf_counter()
        if self.ensemble.live is None and self.ensemble.step == 0 or self.ensemble.round > 0:
            self._draw_images(self.ensemble.round)

    def _needed_space(self) -> None:
        weights = sum(tensor.nbytes for tensor in self.ensemble.denoiser.values())
        averages = 2 if self.config.optimizer.use_ema else 1
        moments = len(self.indices) if self.config.ensemble.optimizer_across_rounds == "keep" else 1
        models = (p for c in self.family.pipeline.components.values() if isinstance(c, torch.nn.Module) for p in [c])
        pipeline = sum(p.nbytes for model in models for p in model.parameters())
        outputs.check_space(self.output, 4 * weights * averages + 2 * weights * moments + pipeline)

    def _log(self, clone: Clone) -> None:
        """Reads the device once, shows what came since the last time, and ends a run that has gone wrong."""
        sums = clone.meter.read()
        since, self._read_so_far = sums.combined(self._read_so_far, -1), sums
        place = (
            f"round {self.ensemble.round + 1}/{self.schedule.rounds} "
            f"shard {clone.shard + 1}/{len(self.ensemble.clones)}"
        )
        self.progress.describe(place, since.loss, since.skip_rate)
        rate = self.courses[clone.shard](clone.step - 1)
        values = {"loss": since.loss, "skip_rate": since.skip_rate, "lr": rate}
        self.trackers.log(values, self.ensemble.step)
        self._stop_if_broken(clone, sums)

    def _stop_if_broken(self, clone: Clone, sums: RoundSums) -> None:
        if sums.broken_step < 0:
            return
        # Broken steps changed no weight; a resumed run is to judge its own steps.
        clone.meter.broken_step.fill_(-1)
        path = self._save_checkpoint()
        self.progress.close()
        raise UserError(
            f"the loss or gradient was not finite in round {self.ensemble.round + 1}, shard {clone.shard + 1} of "
            f"{len(self.ensemble.clones)}, step {sums.broken_step + 1}. The last good weights are saved in {path}: "
            "lower `--learning_rate`, lower `--max_grad_norm` or use `--mixed_precision no`, and resume from there."
        )

    def _checkpoint_is_due(self) -> bool:
        return self.ensemble.step % self.config.checkpoint.checkpointing_steps == 0

    def _checkpoint_between_clones(self) -> None:
        if self._checkpoint_is_due() and any(True for _ in self.ensemble.pending_shards):
            self._save_checkpoint()

    def _save_checkpoint(self) -> Path:
        facts = {
            "position": self.ensemble.position(),
            "identity": self.identity,
            "settings": free_settings(self.config),
            "environment": environment(),
        }
        return self.store.save(self.ensemble.step, self.ensemble.pieces(self.local.state()), facts)

    def _after_round(self, round_: int, drift: float) -> None:
        line = self._round_line(round_, drift)
        append_line(self.output / METRICS, line)
        for clone in self.ensemble.clones:
            clone.meter.clear()
        self._save_checkpoint()
        self.trackers.log({f"round/{k}": v for k, v in line.items() if isinstance(v, float)}, self.ensemble.step)
        self.progress.say(
            f"round {round_}/{self.schedule.rounds}: loss {line['loss']:.4f}, skipped {line['skip_rate']:.1%}"
        )
        self._draw_images(round_)
        now = time.perf_counter()
        append_line(self.output / TIMINGS, {"round": round_, "seconds": round(now - self._round_began, 3)})
        self._round_began = now

    def _round_line(self, round_: int, drift: float) -> dict[str, Any]:
        sums = [clone.meter.read() for clone in self.ensemble.clones]
        total = sums[0]
        for other in sums[1:]:
            total = total.combined(other)
        return {
            "round": round_,
            "step": self.ensemble.step,
            "loss": total.loss,
            "skip_rate": total.skip_rate,
            "skip_rate_by_noise_level": total.skip_rate_by_level,
            "merge_drift": drift,
            "clone_drift": [clone.drift for clone in self.ensemble.clones],
            "shard_loss": [shard.loss for shard in sums],
            "shard_skip_rate": [shard.skip_rate for shard in sums],
            "lr": [self.courses[clone.shard](max(clone.step - 1, 0)) for clone in self.ensemble.clones],
        }

    def _draw_images(self, round_: int) -> None:
        """Pictures from the merged denoiser, when they are due and not there yet."""
        settings = self.config.validation
        due = round_ % settings.validation_rounds == 0 or round_ == self.schedule.rounds
        path = validation.round_file(self.output, round_)
        if not settings.validation_prompts or not due or (path.exists() and self.checkpoint is not None):
            return
        self._load_result()
        rows = validation.draw_images(self.family, settings, self.config.training.seed, self.config.data.resolution)
        prompts = list(settings.validation_prompts)
        validation.save_picture(validation.grid(rows, prompts), path)
        flat = [(picture, prompt) for row, prompt in zip(rows, prompts, strict=True) for picture in row]
        self.trackers.log_images("validation", [p for p, _ in flat], [c for _, c in flat], self.ensemble.step)

    def _load_result(self) -> None:
        self.trainable.load(self.ensemble.denoiser)
        if self.ensemble.average is not None:
            self.trainable.load(self.ensemble.average)

    def _warn(self, text: str) -> None:
        print(f"warning: {text}", flush=True)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self) -> Path:
        self.progress.close()
        self._load_result()
        outputs.publish(self.output, self._save_pipeline)
        ledgers = [clone.ledger for clone in self.ensemble.clones]
        write_ledger(self.output / LEDGER, self.images, self.heldout, self.indices, ledgers)
        picture = validation.save_before_after(self.output, self.schedule.rounds)
        lines = read_lines(self.output / METRICS)
        write_model_card(self.output, self._card_facts(lines, picture))
        self.trackers.close()
        self._print_summary(lines, picture)
        if self.config.hub.push_to_hub:
            from .hub import push

            print(f"pushed to {push(self.output, self.config.hub)}")
        return self.output

    def _save_pipeline(self, folder: Path) -> None:
        dtypes = dict(self.source.dtypes)
        if self.config.model.save_dtype is not None:
            dtypes[self.family.denoiser_name] = getattr(torch, self.config.model.save_dtype)
        denoiser = self.family.denoiser
        self.accelerator.unwrap_model(denoiser, keep_fp32_wrapper=False)
        save_pipeline(self.family.pipeline, folder, dtypes)

    def _card_facts(self, lines: list[dict[str, Any]], picture: Path | None) -> CardFacts:
        return CardFacts(
            base_model=str(self.config.model.pretrained_model_name_or_path),
            base_license=base_license(self.source.folder),
            pipeline_class=self.source.class_name,
            flags=self.config.to_flags(),
            num_images=len(self.images),
            num_distinct_images=len(set(self.images.content_hashes)),
            num_heldout=len(self.heldout),
            rounds=self.ensemble.round,
            steps=self.ensemble.step,
            skip_rates=tuple(line["skip_rate"] for line in lines),
            sample_grid=str(picture.relative_to(self.output)) if picture is not None else None,
            versions=environment()["versions"],
        )

    def _print_summary(self, lines: list[dict[str, Any]], picture: Path | None) -> None:
        rates = " ".join(f"{line['skip_rate']:.1%}" for line in lines)
        print(f"skipped by round: {rates}")
        if picture is not None:
            print(f"before and after: {picture}")
        print(f'load it with: DiffusionPipeline.from_pretrained("{self.output}")', flush=True)
