"""From a configuration to the parts of a run: data, shards, pipeline, clones and what trains them."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration

from ..cache.caching import encode_data
from ..config.config import Config
from ..config.identity import common_flags, run_identity
from ..config.settings import DEFAULT_MERGE_EPOCHS
from ..data.dataset import TrainingImages, load_images
from ..data.loader import Shard
from ..data.transforms import ImageTransform
from ..distributed.groups import Group, Placement, Ranks
from ..ensemble.budget import check_memory, host_need
from ..ensemble.clone import Clone
from ..ensemble.ema import EMA
from ..ensemble.ensemble import Ensemble
from ..ensemble.host import HostMemory, check_offload
from ..ensemble.ledger import ShardLedger
from ..ensemble.meter import RoundMeter
from ..ensemble.optimizers import build_optimizer, learning_rate_schedule
from ..ensemble.trainable import Trainable
from ..errors import UserError, one_line
from ..families import Family, PipelineSource, family_class, find_pipeline, load_family
from ..lora.adapters import Adapter, add_adapter
from ..method.agc import AntiGradientControl
from ..method.schedule import Schedule
from ..method.sharding import shard_indices
from .compiling import TOLERANCE, compile_denoiser
from .local import LocalTraining
from .mergers import build_mergers

# What autocast multiplies in, by the name of the mixed precision.
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Parts:
    """Everything a run works with.

    Attributes:
        ranks, placement: all ranks of the run, and which of them trains which shard.
        images, heldout: the training images, and those kept out.
        indices: which images are in each shard.
        shards: the same as what a data loader reads.
        schedule: when each clone steps and when they are merged.
        adapter: the LoRA layers of the denoiser, or None if all of it is trained.
        courses: each clone's learning rate by its step.
        identity: what a run that resumes this one must share with it.
    """

    accelerator: Accelerator
    ranks: Ranks
    placement: Placement
    source: PipelineSource
    family: Family
    images: TrainingImages
    heldout: TrainingImages
    indices: tuple[np.ndarray, ...]
    shards: list[Shard]
    schedule: Schedule
    trainable: Trainable
    adapter: Adapter | None
    ensemble: Ensemble
    local: LocalTraining
    courses: list[Callable[[int], float]]
    identity: dict[str, Any]


def build_parts(config: Config, accelerator: Accelerator, ranks: Ranks) -> Parts:
    """Builds them in the order in which mistakes are cheapest: the pipeline's index, then data, then weights.

    Every rank builds its own; what they share is downloaded and prepared by the first one of each machine.

    Raises:
        UserError: whatever the user can mend.
    """
    _check_same_everywhere(ranks, common_flags(config))
    placement = Placement.plan(config.ensemble.num_shards, ranks.size)
    with ranks.first_on_machine():
        source = find_pipeline(config.model)
        kind = family_class(source, config.model)
        images, heldout = load_images(
            config.data,
            cache_dir=config.model.cache_dir,
            seed=config.training.seed,
            shard_by_column=config.ensemble.shard_by_column,
            needs_captions=kind.needs_captions,
        )
    _check_enough(config.ensemble.num_shards, len(images))
    indices = shard_indices(len(images), config.ensemble.num_shards, config.training.seed, images.shard_labels)
    schedule = _schedule(config, tuple(len(part) for part in indices))
    with ranks.first_on_machine():
        family = load_family(source, config)
    family.take_classes(images.class_names, max(images.classes or (0,)))
    _check_validation(config, family)
    _check_export(config, family)
    latent_shape = family.latent_shape(config.data.resolution)
    identity = run_identity(config, images.fingerprint, family.fingerprint())
    # Before a group is made, whose members begin with the weights of the first: then there is no telling.
    _check_same_everywhere(ranks, identity)
    shards = _shards(config, family, images, indices, latent_shape, ranks, accelerator.device)
    group = ranks.group(placement)
    adapter = _prepare_denoiser(config, family, accelerator, group)
    parts = Parts(
        accelerator=accelerator,
        ranks=ranks,
        placement=placement,
        source=source,
        family=family,
        images=images,
        heldout=heldout,
        indices=indices,
        shards=shards,
        schedule=schedule,
        identity=identity,
        adapter=adapter,
        **_training_parts(config, family, adapter, indices, schedule, accelerator, ranks, placement, group),
    )
    if config.training.compile:
        mine = placement.shards_of(ranks.rank)
        parts.local.check_compiled(shards[mine[0]], TOLERANCE[accelerator.mixed_precision])
    return parts


def _check_enough(num_shards: int, images: int) -> None:
    if images < num_shards:
        raise UserError(
            f"`--num_shards {num_shards}` needs at least {num_shards} images, but there are {images}. "
            "Lower `--num_shards` or add images."
        )


def _schedule(config: Config, shard_sizes: tuple[int, ...]) -> Schedule:
    training, ensemble = config.training, config.ensemble
    return Schedule.plan(
        shard_sizes,
        training.train_batch_size * training.gradient_accumulation_steps,
        num_train_epochs=training.num_train_epochs,
        max_train_steps=training.max_train_steps,
        merge_every_epochs=ensemble.merge_every_epochs or DEFAULT_MERGE_EPOCHS,
        merge_every_steps=ensemble.merge_every_steps,
    )


def _check_same_everywhere(ranks: Ranks, values: dict[str, Any]) -> None:
    """Raises a `UserError` that names what the ranks do not agree on: each machine may have its own files."""
    first, *others = ranks.all_gather_object(values)
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                raise UserError(
                    f"{name} on rank {rank} is not that on rank 0: give all ranks the same flags, data and base model."
                )


def _training_parts(
    config: Config,
    family: Family,
    adapter: Adapter | None,
    indices: tuple[np.ndarray, ...],
    schedule: Schedule,
    accelerator: Accelerator,
    ranks: Ranks,
    placement: Placement,
    group: Group,
) -> dict[str, Any]:
    trainable = Trainable(family.denoiser, buffers=adapter is None)
    optimizer = build_optimizer(trainable.parameters.values(), config.optimizer, config.training)
    base_rate = optimizer.param_groups[0]["lr"]
    ema = None
    if config.optimizer.use_ema:
        ema = EMA(trainable.parameters, config.optimizer.ema_max_decay, start_share=config.merges_exactly)
    adapted = adapter.nbytes if adapter is not None and config.merges_exactly else 0
    host = _host_memory(config, trainable, adapted, accelerator.device, ranks, placement)
    ensemble = Ensemble(
        trainable,
        optimizer,
        ema,
        [_new_clone(config, shard, len(part), family, accelerator.device) for shard, part in enumerate(indices)],
        build_mergers(config, trainable, adapter, optimizer, ema, ranks, host),
        ranks,
        placement,
        host,
        moments=config.ensemble.optimizer_across_rounds,
        seed=config.training.seed,
    )
    return {
        "trainable": trainable,
        "ensemble": ensemble,
        "local": LocalTraining(
            family, trainable, optimizer, ema, config, accelerator.device, group, accelerator.scaler
        ),
        "courses": [learning_rate_schedule(config.optimizer, steps, base_rate) for steps in schedule.total_steps],
    }


def start_accelerator(config: Config) -> Accelerator:
    """Accelerate for this rank, with the trackers that are asked for.

    Raises:
        UserError: a tracker that is not installed, a precision the device has not, an engine that splits models, or
            other ranks that do not come.
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
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.training.ddp_timeout))],
            project_config=ProjectConfiguration(
                project_dir=str(config.output_path), logging_dir=str(config.output_path / config.logging.logging_dir)
            ),
        )
    except ValueError as error:
        precision = config.training.mixed_precision
        raise UserError(f"Accelerate cannot run with `--mixed_precision {precision}`: {one_line(error)}") from None
    except torch.distributed.DistError as error:
        timeout, reason = config.training.ddp_timeout, one_line(error).rstrip(".")
        raise UserError(
            f"the ranks did not come together within `--ddp_timeout {timeout}` ({reason}): look for an error of "
            "another rank, and whether all machines were started and reach the first one."
        ) from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate itself, whose own configuration may ask for it, would train in fp32 without a word.
        raise UserError("`--mixed_precision fp16` needs a GPU: use `--mixed_precision bf16` or `no` on a CPU.")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"Accelerate's configuration asks for {accelerator.distributed_type.value}, and each rank must hold a "
            "whole clone: launch with `--config_file configs/accelerate/several_gpus.yaml`, or `--multi_gpu`."
        )
    if config.training.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def _check_validation(config: Config, family: Family) -> None:
    steps = config.validation.validation_inference_steps
    if family.prompts(config.validation) and steps > len(family.objective):
        raise UserError(
            f"`--validation_inference_steps {steps}` is more than the {len(family.objective)} steps of the pipeline's "
            "noise schedule: lower it."
        )


def _check_export(config: Config, family: Family) -> None:
    form = config.adapter.lora_export
    if form not in (None, "fuse") and not family.loads_lora:
        raise UserError(
            f"`--lora_export {form}`: a {type(family.pipeline).__name__} loads no LoRA files: choose `fuse`, or leave "
            "it out."
        )


def _shards(
    config: Config,
    family: Family,
    images: TrainingImages,
    indices: tuple[np.ndarray, ...],
    latent_shape: tuple[int, int, int],
    ranks: Ranks,
    device: torch.device,
) -> list[Shard]:
    """What the clones read; encodes the data if it is to be cached, while nothing else is on the device."""
    transform = ImageTransform(
        config.data.resolution,
        center_crop=config.data.center_crop,
        interpolation=config.data.image_interpolation_mode,
        seed=config.training.seed,
    )
    encoded = None
    if config.data.cache_latents:
        family.freeze()
        encoded = encode_data(config, family, images, transform, ranks, device)
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
            encoded=encoded,
        )
        for number, part in enumerate(indices)
    ]


def _prepare_denoiser(config: Config, family: Family, accelerator: Accelerator, group: Group) -> Adapter | None:
    # What is cached is not encoded again: the encoders stay on the host.
    family.place(accelerator.device, encoders=not config.data.cache_latents)
    adapter = None
    if config.adapter.use_lora:
        adapter = add_adapter(family.denoiser, config.adapter, family.lora_layers, config.training.seed)
        # What is rounded must be read again to be saved, and random weights were never stored.
        if accelerator.mixed_precision in HALF and config.model.model_config is None:
            adapter.round_frozen(HALF[accelerator.mixed_precision])
    if config.training.gradient_checkpointing:
        family.pipeline.components[family.denoiser_name].enable_gradient_checkpointing()
    if config.training.channels_last:
        family.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    family.denoiser.train()
    # Evaluation mode gives placement and autocast without DistributedDataParallel, which would average clones.
    accelerator.prepare_model(family.denoiser, evaluation_mode=True)
    if config.training.compile:
        compile_denoiser(family.denoiser)
    family.network = group.wrap(family.denoiser)
    return adapter


def _host_memory(
    config: Config, trainable: Trainable, adapted: int, device: torch.device, ranks: Ranks, placement: Placement
) -> HostMemory:
    """Where the ensemble's tensors will wait; a `UserError` if there is not room for them."""
    ensemble, folder = config.ensemble, config.ensemble.offload_dir
    need = host_need(
        weights=sum(parameter.numel() * 4 for parameter in trainable.parameters.values()),
        ranks=ranks.size,
        shards_of_rank=len(placement.shards_of(ranks.rank)),
        num_shards=ensemble.num_shards,
        ema=config.optimizer.use_ema,
        moments=ensemble.optimizer_across_rounds,
        outer_momentum=ensemble.outer_momentum > 0,
        device_is_host=device.type == "cpu",
        state_bytes_per_weight_byte=0.5 if config.optimizer.use_8bit_adam else 2.0,
        outer=ensemble.outer_lr != 1,
        adapted=adapted,
    )
    if folder is not None:
        check_offload(Path(folder), need.offloaded, ranks.local_size)
    check_memory(
        need.live if folder is not None else need.total,
        ranks.local_size,
        can_offload=folder is None,
        can_reset=ensemble.optimizer_across_rounds == "keep",
    )
    return HostMemory(device, Path(folder) if folder is not None else None)


def _new_clone(config: Config, shard: int, size: int, family: Family, device: torch.device) -> Clone:
    bins = config.agc.agc_bins or family.objective.default_bins
    agc = AntiGradientControl(bins, config.agc.agc_threshold, config.agc.agc_decay)
    weight = size if config.ensemble.merge_weighting == "samples" else 1
    return Clone(shard, weight, agc.to(device), ShardLedger(size).to(device), RoundMeter(device))
