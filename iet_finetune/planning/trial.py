"""A few steps of a run on some of its images, to measure what the whole of it will take."""

import contextlib
import io
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config.config import Config
from ..data.loader import Shard, Visit
from ..distributed.placement import Placement
from ..ensemble.budget import Need
from ..ensemble.ema import EMA
from ..errors import UserError
from ..families import Family
from ..files import CLASS_FOLDER
from ..training.callbacks import Callback, StepFacts
from ..training.class_images import AT_ONCE, missing
from ..training.data import Found, compares_with
from ..training.needs import need_of_run
from ..training.trainer import Trainer
from .peaks import peak_resident, reset_peak

# Rounds, and the steps of each clone in each of them.
ROUNDS, STEPS = 2, 3
# Clones, and denoising steps of a validation image, at most.
MOST_CLONES, MOST_DENOISING = 2, 4


class Needs(NamedTuple):
    """What training keeps on a rank, counted: in the trial, and in the run that it stands for."""

    trial: Need = Need()
    run: Need = Need()


@dataclass
class Trial:
    """What was measured of a shortened run.

    Attributes:
        config: its settings.
        steps, images: how many steps were timed, and images in them; the first step of a clone in a round is not.
        step_seconds: of these steps together.
        seconds: of each phase of `Callback.on_phase`, as often as it was entered.
        host, device: the most bytes in each phase, of this process's memory and of tensors on the GPU.
        encoded: how many images there were to train on, and beside them.
        drawn: how many of the latter were drawn.
        rows: bytes in the cache of an encoded image, its mirrored copy included, and of a caption; 0 without a cache.
        result: bytes of the finished pipeline or LoRA file.
        needs: what training keeps, here and in the run.
        family: the pipeline.
    """

    config: Config
    steps: int = 0
    images: int = 0
    step_seconds: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)
    encoded: int = 0
    drawn: int = 0
    rows: tuple[int, int] = (0, 0)
    result: int = 0
    needs: Needs = Needs()
    family: Family | None = None


def try_out(config: Config, found: Found, placement: Placement) -> Trial:
    """Trains a little as the configuration says, in a folder that is removed; nothing of it is printed.

    What it encodes stays in the cache, where the run will find it.

    Args:
        found: all images of the run.
        placement: of its shards on its ranks.

    Raises:
        UserError: whatever the user can mend, and too little memory on the device.
    """
    # On the disk of the run, whose checkpoints are as large, and as fast to write.
    there = next(folder for folder in config.output_path.absolute().parents if folder.exists())
    place = there if os.access(there, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".iet_finetune-plan-", dir=place) as folder:
        trial = Trial(shortened(config, found, Path(folder) / "output"))
        watch = _Watch(trial)
        try:
            with _silenced():
                trainer = Trainer(trial.config, [watch])
                trial.needs = Needs(trainer.run.need, _need_of(config, trainer, placement))
                output = trainer.train()
        except KeyboardInterrupt:
            # Its checkpoints are gone with the folder.
            raise KeyboardInterrupt("the same command starts over") from None
        watch.close()
        trial.result = _size_of_result(output)
    data = trainer.data
    trial.family, trial.drawn = trainer.model.family, data.beside.drawn if data.beside is not None else 0
    trial.encoded = len(data.images) + (len(data.beside.images) if data.beside is not None else 0)
    trial.rows = _row_sizes(data.shards[0], mirrored=config.data.random_flip)
    return trial


def _row_sizes(shard: Shard, *, mirrored: bool) -> tuple[int, int]:
    """As `Trial.rows`, of the first sample that a shard reads."""
    sample = shard[Visit(0, 0)]
    # The trial has read it: it is no error.
    if isinstance(sample, UserError) or (encoded := sample.encoded) is None:
        return 0, 0
    image = encoded.mean.nbytes + (encoded.std.nbytes if encoded.std is not None else 0)
    return image * (1 + mirrored), sum(tensor.nbytes for tensor in encoded.conditions.values())


def _need_of(config: Config, trainer: Trainer, placement: Placement) -> Need:
    """What the first rank of the whole run keeps, whose model is that of the trial."""
    model, ema = trainer.model, None
    if config.optimizer.use_ema:
        without_values = {name: tensor.to("meta") for name, tensor in model.trainable.parameters.items()}
        ema = EMA(without_values, config.optimizer.ema_max_decay, start_share=config.merges_exactly)
    return need_of_run(config, model.trainable, model.adapter, ema, placement, 0)


def shortened(config: Config, found: Found, output: Path) -> Config:
    """The run cut down to `ROUNDS` rounds of `STEPS` steps on as many images as they need.

    Args:
        found: all its images.
        output: its folder.
    """
    clones = min(config.ensemble.num_shards, MOST_CLONES)
    changes: dict[str, Any] = {
        "output_dir": str(output),
        "resume_from_checkpoint": None,
        "dry_run": False,
        "report_to": "none",
        "audit": False,
        "push_to_hub": False,
        "dedup": "none",
        "num_shards": clones,
        "max_train_samples": _images_needed(config, found, clones),
        "max_train_steps": ROUNDS * STEPS,
        "total_train_steps": None,
        "merge_every_steps": STEPS,
        "merge_every_epochs": None,
        # Every step is then waited for, and so timed by itself.
        "logging_steps": 1,
        "checkpointing_steps": 10**9,
        "checkpoints_total_limit": 1,
        "save_every_rounds": None,
        "validation_prompts": list(config.validation.validation_prompts[:1]),
        "validation_rounds": ROUNDS,
        "validation_inference_steps": min(config.validation.validation_inference_steps, MOST_DENOISING),
    }
    if config.prior.is_on and missing(config):
        # A few are drawn in its own folder.
        changes |= {"class_data_dir": None, "num_class_images": AT_ONCE}
    elif config.prior.is_on:
        changes["class_data_dir"] = str(config.class_path)
    return Config.from_flags(**(config.to_flags() | changes))


def _images_needed(config: Config, found: Found, clones: int) -> int:
    """How many to load, the held-out ones among them."""
    training, share = config.training, config.data.holdout_fraction
    there = len(found.images) + len(found.heldout) + len(found.left_out.images)
    needed = clones * STEPS * training.train_batch_size * training.gradient_accumulation_steps / (1 - share)
    if (least := compares_with(config)) and config.audit.holdout_data_dir is None:
        # One more, as the share is rounded.
        needed = max(needed, (least + 1) / share)
    return min(math.ceil(needed), there)


class _Watch(Callback):
    """Times the phases and steps of a run, and notes the most memory of each phase."""

    def __init__(self, trial: Trial) -> None:
        self._trial, self._phase, self._is_first = trial, "starting", True
        self._since = self._stepped = time.perf_counter()
        _reset_peaks()

    def on_phase(self, phase: str) -> None:
        self.close()
        self._phase, self._is_first = phase, True
        self._since = time.perf_counter()

    def close(self) -> None:
        """Notes the phase that ends."""
        trial, phase = self._trial, self._phase
        trial.seconds.setdefault(phase, []).append(time.perf_counter() - self._since)
        trial.host[phase] = max(trial.host.get(phase, 0), peak_resident())
        if torch.cuda.is_available():
            trial.device[phase] = max(trial.device.get(phase, 0), torch.cuda.max_memory_allocated())
        _reset_peaks()

    def on_step_end(self, facts: StepFacts) -> None:
        now = time.perf_counter()
        if not self._is_first:
            self._trial.steps += 1
            self._trial.images += facts.images
            self._trial.step_seconds += now - self._stepped
        self._is_first, self._stepped = False, now


def _reset_peaks() -> None:
    reset_peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _size_of_result(output: Path) -> int:
    """Bytes of the pipeline or LoRA file in an output folder."""
    beside = ("checkpoint-", "validation", "audit", "logs", CLASS_FOLDER)
    files = (file for file in output.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files if not file.relative_to(output).parts[0].startswith(beside))


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
