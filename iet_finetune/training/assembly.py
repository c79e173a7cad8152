"""From a configuration to everything that a run works with, in the order in which mistakes are cheapest."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from ..config.config import Config
from ..config.identity import common_flags, run_identity
from ..config.registry import SKIP_RULES
from ..data.buckets import numbers_of
from ..distributed.groups import Group, Placement, Ranks
from ..ensemble.across_rounds import POLICIES
from ..ensemble.budget import Need, check_memory
from ..ensemble.clone import Clone
from ..ensemble.ema import EMA
from ..ensemble.ensemble import Ensemble
from ..ensemble.host import HostMemory, check_offload
from ..ensemble.ledger import ShardLedger
from ..ensemble.meter import RoundMeter
from ..ensemble.optimizers import build_optimizer, learning_rate_schedule
from ..errors import UserError
from ..families import family_class, find_pipeline, source_of
from ..lora.beginning import read_beginning
from ..method.rules import SkipRule
from .class_images import find_class_images
from .compiling import TOLERANCE
from .data import LEAST_HELDOUT, Data, compares_with, find_images, read_shards, schedule_of, split
from .lending import Lender
from .local import LocalTraining
from .mergers import build_mergers
from .model import Model, load_model, prepare_model
from .needs import need_of_run
from .noising import Noising
from .overview import overview
from .room import check_room
from .stopping import Stopping
from .validation import encode_validation


@dataclass(frozen=True)
class Run:
    """What trains the clones and merges them.

    Attributes:
        ranks, placement: all ranks of the run, and which of them trains which shard.
        lender: what skip rules see of the run.
        stopping: whether it is enough.
        learning_rates: each clone's learning rate by its step.
        need: bytes that all of this takes on a rank.
        identity: what a run that resumes this one must share with it.
    """

    accelerator: Accelerator
    ranks: Ranks
    placement: Placement
    ensemble: Ensemble
    local: LocalTraining
    lender: Lender
    stopping: Stopping
    learning_rates: list[Callable[[int], float]]
    need: Need
    identity: dict[str, Any]


def assemble(
    config: Config,
    accelerator: Accelerator,
    ranks: Ranks,
    pipeline: Any = None,
    dataset: Any = None,
    heldout_images: Any = None,
    entering: Callable[[str], None] = lambda phase: None,
) -> tuple[Data, Model, Run]:
    """Builds them in the order in which mistakes are cheapest: the pipeline's index, then data, then weights.

    Every rank builds its own; what they share is downloaded and prepared by the first one of each machine.

    Args:
        pipeline, dataset, heldout_images: a loaded pipeline and a `datasets.Dataset` each, or None where the flags
            name them.
        entering: is told of each phase; see `Callback.on_phase`.

    Raises:
        UserError: whatever the user can mend.
    """
    entering("reading")
    _check_same_everywhere(ranks, common_flags(config))
    placement = Placement.plan(config.ensemble.num_shards, ranks.size)
    group = ranks.connect(placement)
    beginning = read_beginning(config.adapter.init_lora, config.adapter.rank)
    with ranks.first_on_machine():
        source = find_pipeline(config.model) if pipeline is None else source_of(pipeline)
        needs_captions = family_class(source, config.model).needs_captions
        found = find_images(config, needs_captions, dataset, heldout_images)
    indices = split(config, found.images)
    entering("loading")
    with ranks.first_on_machine():
        if ranks.local_rank == 0:
            # For all ranks of the machine, before any of them takes memory.
            check_room(config, source, placement, ranks, accelerator.device)
        # The precision may also be that of Accelerate's own configuration.
        precise = replace(config, training=replace(config.training, mixed_precision=accelerator.mixed_precision))
        family = load_model(source, precise, found.images, accelerator.device, pipeline)
    family.latent_shape(config.data.resolution)  # raises an error where images of that size cannot be drawn
    buckets = family.buckets(config.data)
    for each in (found.images, found.watched):
        numbers_of(each, buckets)  # raises an error where an image is too small
    schedule = schedule_of(config, found.images, indices, buckets)
    if config.prior.is_on:
        entering("drawing class images")
    beside = find_class_images(config, family, ranks, accelerator)
    identity = run_identity(config, found.images.fingerprint, family.fingerprint())
    identity["the adapter of `--init_lora`"] = beginning.digest if beginning is not None else None
    if beside is not None:
        identity["the class data"] = beside.images.fingerprint
    if compares_with(config):
        identity["the held-out images"] = found.watched.fingerprint
    # Before a group trains, whose members begin with the weights of the first: then there is no telling.
    _check_same_everywhere(ranks, identity)
    if ranks.is_main:
        # Before anything takes time.
        print(*source.notes, *overview(config, found, schedule, family, beside), sep="\n", flush=True)
    entering("encoding")
    of_class = beside.images if beside is not None else None
    shards, others = read_shards(config, family, found, indices, buckets, ranks, accelerator.device, of_class)
    prompts = encode_validation(config, family, accelerator.device) if ranks.is_main else None
    if not ranks.is_main and source.folder is not None and config.data.cache_latents:
        # Only the main rank draws and saves.
        family.drop_encoders()
    # What encoding took of a GPU is given back: its blocks have other sizes than those of training.
    clear_device_cache()
    entering("preparing")
    data = Data(*found, indices, shards, others, schedule, beside)
    model = prepare_model(source, family, config, accelerator, group, beginning, prompts)
    run = _build_run(config, data, model, accelerator, ranks, placement, group, identity)
    if config.training.compile:
        mine = placement.shards_of(ranks.rank)
        first = schedule.steps(mine[0], 0, 1)
        run.local.check_compiled(shards[mine[0]], first, TOLERANCE[accelerator.mixed_precision])
    return data, model, run


def _check_same_everywhere(ranks: Ranks, values: dict[str, Any]) -> None:
    """Raises a `UserError` that names what the ranks do not agree on: each machine may have its own files."""
    first, *others = ranks.all_gather_object(values)
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                raise UserError(
                    f"{name} on rank {rank} is not that on rank 0: give all ranks the same flags, data and base model."
                )


def _build_run(
    config: Config,
    data: Data,
    model: Model,
    accelerator: Accelerator,
    ranks: Ranks,
    placement: Placement,
    group: Group,
    identity: dict[str, Any],
) -> Run:
    family, adapter, trainable, device = model.family, model.adapter, model.trainable, accelerator.device
    optimizer = build_optimizer(trainable.parameters.values(), config.optimizer, config.training)
    base_rate = optimizer.param_groups[0]["lr"]
    ema = None
    if config.optimizer.use_ema:
        ema = EMA(trainable.parameters, config.optimizer.ema_max_decay, start_share=config.merges_exactly)
    policy = POLICIES[config.ensemble.optimizer_across_rounds]
    entry, settings = config.chosen(SKIP_RULES)
    rule: type[SkipRule] = entry.load()
    make_rule = partial(rule, settings, objective=family.objective, device=device)
    need = need_of_run(config, trainable, adapter, ema, placement, ranks.rank)
    host = _host_memory(config, need, device, ranks)
    mergers = build_mergers(config, trainable, adapter, ema, ranks, host)
    ensemble = Ensemble(
        trainable,
        ema,
        [_new_clone(config, shard, len(part), make_rule, device) for shard, part in enumerate(data.indices)],
        mergers,
        policy(optimizer, ranks, placement, host),
        ranks,
        placement,
        seed=config.training.seed,
    )
    batch = config.training.train_batch_size
    noising = Noising(family, config, device, -(-batch // group.size))
    local = LocalTraining(family, trainable, optimizer, ema, config, device, group, noising, accelerator.scaler)
    lender = Lender(data, model, mergers, noising, ranks, rule.borrows_with(settings), batch)
    rates = [learning_rate_schedule(config.optimizer, steps, base_rate) for steps in data.schedule.total_steps]
    patience = config.training.stop_patience if config.training.stop_when == "auto" else None
    stopping = Stopping(patience, watches=len(data.watched) >= LEAST_HELDOUT)
    return Run(accelerator, ranks, placement, ensemble, local, lender, stopping, rates, need, identity)


def _host_memory(config: Config, need: Need, device: torch.device, ranks: Ranks) -> HostMemory:
    """Where the ensemble's idle tensors will be; a `UserError` if there is not room for them."""
    ensemble, folder = config.ensemble, config.ensemble.offload_dir
    if folder is not None:
        check_offload(Path(folder), need.host, ranks.local_size)
    check_memory(
        need.memory(device_is_host=device.type == "cpu", offloaded=folder is not None),
        ranks.local_size,
        can_offload=folder is None,
        can_reset=ensemble.optimizer_across_rounds == "keep",
    )
    return HostMemory(device, Path(folder) if folder is not None else None)


def _new_clone(
    config: Config, shard: int, size: int, make_rule: Callable[..., SkipRule], device: torch.device
) -> Clone:
    weight = size if config.ensemble.merge_weighting == "samples" else 1
    return Clone(shard, weight, make_rule(num_images=size), ShardLedger(size).to(device), RoundMeter(device))
