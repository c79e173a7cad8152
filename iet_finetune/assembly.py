"""From a configuration to the parts of a run: data, shards, pipeline, clones and what trains them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration

from .adapters import Trainable
from .agc import AntiGradientControl
from .config import Config
from .data.dataset import TrainingImages, load_images
from .data.loader import Shard
from .data.transforms import ImageTransform
from .ema import EMA
from .ensemble import Clone, Ensemble
from .errors import UserError, one_line
from .families import Family, PipelineSource, family_class, find_pipeline, load_family
from .identity import run_identity
from .ledger import ShardLedger
from .local import LocalTraining
from .optimizers import build_optimizer, learning_rate_course
from .schedule import Schedule
from .sharding import shard_indices
from .tracking import RoundMeter


@dataclass(frozen=True)
class Parts:
    """Everything a run works with.

    Attributes:
        images, heldout: the training images, and those kept out.
        indices: which images are in each shard.
        shards: the same as what a data loader reads.
        schedule: when each clone steps and when they are merged.
        courses: each clone's learning rate by its step.
        identity: what a run that resumes this one must share with it.
    """

    accelerator: Accelerator
    source: PipelineSource
    family: Family
    images: TrainingImages
    heldout: TrainingImages
    indices: tuple[np.ndarray, ...]
    shards: list[Shard]
    schedule: Schedule
    trainable: Trainable
    ensemble: Ensemble
    local: LocalTraining
    courses: list[Callable[[int], float]]
    identity: dict[str, Any]


def build_parts(config: Config, accelerator: Accelerator) -> Parts:
    """Builds them in the order in which mistakes are cheapest: the pipeline's index, then data, then weights.

    Raises:
        UserError: whatever the user can mend.
    """
    source = find_pipeline(config.model)
    family_class(source, config.model)
    images, heldout = load_images(
        config.data,
        cache_dir=config.model.cache_dir,
        seed=config.training.seed,
        shard_by_column=config.ensemble.shard_by_column,
    )
    indices = shard_indices(len(images), config.ensemble.num_shards, config.training.seed, images.shard_labels)
    schedule = Schedule.plan(tuple(len(part) for part in indices), config.training, config.ensemble)
    family = load_family(source, config.model)
    _check_validation(config, family)
    shards = _shards(config, images, indices, family.latent_shape(config.data.resolution))
    _prepare_denoiser(config, family, accelerator)
    return Parts(
        accelerator=accelerator,
        source=source,
        family=family,
        images=images,
        heldout=heldout,
        indices=indices,
        shards=shards,
        schedule=schedule,
        identity=run_identity(config, images.fingerprint, family.fingerprint()),
        **_training_parts(config, family, indices, schedule, accelerator),
    )


def _training_parts(
    config: Config,
    family: Family,
    indices: tuple[np.ndarray, ...],
    schedule: Schedule,
    accelerator: Accelerator,
) -> dict[str, Any]:
    trainable = Trainable(family.denoiser)
    optimizer = build_optimizer(trainable.parameters.values(), config.optimizer, config.training)
    base_rate = optimizer.param_groups[0]["lr"]
    ema = EMA(trainable.parameters, config.optimizer.ema_max_decay) if config.optimizer.use_ema else None
    ensemble = Ensemble(
        trainable,
        optimizer,
        ema,
        [_new_clone(config, shard, len(part), family, accelerator.device) for shard, part in enumerate(indices)],
        keep_moments=config.ensemble.optimizer_across_rounds == "keep",
        seed=config.training.seed,
    )
    return {
        "trainable": trainable,
        "ensemble": ensemble,
        "local": LocalTraining(family, trainable, optimizer, ema, config, accelerator.device, accelerator.scaler),
        "courses": [learning_rate_course(config.optimizer, steps, base_rate) for steps in schedule.total_steps],
    }


def start_accelerator(config: Config) -> Accelerator:
    """Accelerate for one process, with the trackers that are asked for.

    Raises:
        UserError: a tracker that is not installed, a precision the device has not, or several processes.
    """
    report_to = config.logging.report_to
    available = [str(tracker.value) for tracker in get_available_trackers()]
    if report_to not in ("none", "all", *available):
        raise UserError(f"`--report_to {report_to}` needs a package: `pip install {report_to}`.")
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=1,
            mixed_precision=config.training.mixed_precision,
            log_with=None if report_to == "none" else report_to,
            project_config=ProjectConfiguration(
                project_dir=str(config.output_path), logging_dir=str(config.output_path / config.logging.logging_dir)
            ),
        )
    except ValueError as error:
        precision = config.training.mixed_precision
        raise UserError(f"Accelerate cannot run with `--mixed_precision {precision}`: {one_line(error)}") from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate itself, whose own configuration may ask for it, would train in fp32 without a word.
        raise UserError("`--mixed_precision fp16` needs a GPU: use `--mixed_precision bf16` or `no` on a CPU.")
    if accelerator.num_processes > 1:
        raise UserError(f"training runs in one process, not {accelerator.num_processes}: use `--num_processes 1`.")
    if config.training.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def _check_validation(config: Config, family: Family) -> None:
    steps = config.validation.validation_inference_steps
    if config.validation.validation_prompts and steps > len(family.schedule):
        raise UserError(
            f"`--validation_inference_steps {steps}` is more than the {len(family.schedule)} steps of the pipeline's "
            "noise schedule: lower it."
        )


def _shards(
    config: Config, images: TrainingImages, indices: tuple[np.ndarray, ...], latent_shape: tuple[int, int, int]
) -> list[Shard]:
    transform = ImageTransform(
        config.data.resolution,
        center_crop=config.data.center_crop,
        interpolation=config.data.image_interpolation_mode,
        seed=config.training.seed,
    )
    return [
        Shard(
            images,
            part,
            transform,
            config.data,
            number=number,
            seed=config.training.seed,
            latent_shape=latent_shape,
            noise_offset=config.training.noise_offset,
        )
        for number, part in enumerate(indices)
    ]


def _prepare_denoiser(config: Config, family: Family, accelerator: Accelerator) -> None:
    family.place(accelerator.device)
    if config.training.gradient_checkpointing:
        family.pipeline.components[family.denoiser_name].enable_gradient_checkpointing()
    family.denoiser.train()
    # Evaluation mode gives placement and autocast without DistributedDataParallel, which would average clones.
    accelerator.prepare_model(family.denoiser, evaluation_mode=True)


def _new_clone(config: Config, shard: int, size: int, family: Family, device: torch.device) -> Clone:
    agc = AntiGradientControl(len(family.schedule), config.agc.agc_threshold, config.agc.agc_decay)
    weight = size if config.ensemble.merge_weighting == "samples" else 1
    return Clone(shard, weight, agc.to(device), ShardLedger(size).to(device), RoundMeter(device))
