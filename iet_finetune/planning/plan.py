"""`iet-finetune plan`: what a run would do, need and take, in lines."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ..config.config import Config
from ..distributed.placement import Placement
from ..ensemble.budget import available_memory
from ..errors import UserError
from ..families import family_class, find_pipeline
from ..files import gigabytes
from ..training.data import find_images, split
from ..training.overview import doubt_of_rule, doubts, overview
from ..training.run_words import in_words
from ..training.starting import first_device
from . import estimate
from .trial import Trial, try_out

# What launchers tell each process of a run of several; a plan is made by one.
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class NumRanks(NamedTuple):
    """How many ranks the run would have, and how many of them on this machine."""

    all: int = 1
    here: int = 1

    @classmethod
    def launched(cls) -> "NumRanks":
        """As many as a launcher has started. This process knows nothing of the others from then on."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        for name in _OF_LAUNCHERS:
            os.environ.pop(name, None)
        return cls(size, here)


ALONE = NumRanks()


class Plan(NamedTuple):
    """What a run would be like.

    Attributes:
        about: lines on what it has and does.
        seconds: of its parts.
        host: bytes of this machine's memory for a rank, in each phase.
        device: of the GPU's, without what the allocator and other programs keep; {} without one.
        disk: of what is written to the output folder.
        doubts: what makes little sense or does not fit, each with a reason.
        lines: all of it in words, but for the doubts.
    """

    about: list[str]
    seconds: dict[str, float]
    host: dict[str, int]
    device: dict[str, int]
    disk: dict[str, int]
    doubts: list[str]
    lines: list[str]


def make_plan(config: Config, ranks: NumRanks = ALONE) -> Plan:
    """Looks at the images, and trains a little on some of them to measure; nothing is left but what is cached.

    Raises:
        UserError: whatever the user can mend.
    """
    if config.training.smoke:
        raise UserError("`--smoke` tries a recipe on a tiny model, of which no plan is made: leave it out.")
    placement = Placement.plan(config.ensemble.num_shards, ranks.all)
    source, free = find_pipeline(config.model), available_memory()
    found = find_images(config, family_class(source, config.model).needs_captions)
    _, schedule = split(config, found.images)
    trial = try_out(config, found, placement)
    assert trial.family is not None
    rounds = schedule.remaining_rounds([0] * len(schedule.shard_sizes))
    on_gpu = first_device().memory
    seconds = estimate.seconds(config, trial, schedule, placement, len(found.images))
    host = estimate.memory(trial, device_is_host=on_gpu is None, offloaded=config.ensemble.offload_dir is not None)
    disk = estimate.disk(config, trial, rounds)
    doubtful = list(doubts(config, found.images, schedule, trial.family))
    doubtful += _too_little(host, trial.device, disk, free, on_gpu, ranks, config.output_path)
    about = [*source.notes, *overview(config, found, schedule, trial.family)]
    if doubt_of_rule(config, schedule, trial.family) is None:
        about.append(f"skip rule: {config.training.skip_rule}; it can act, as noise levels and images are met often")
    lines = [*about, *_in_words(config, trial, seconds, host, disk, free, on_gpu, ranks)]
    return Plan(about, seconds, host, trial.device, disk, doubtful, lines)


def _in_words(
    config: Config,
    trial: Trial,
    seconds: Mapping[str, float],
    host: Mapping[str, int],
    disk: Mapping[str, int],
    free: int,
    on_gpu: int | None,
    ranks: NumRanks,
) -> Iterator[str]:
    if on_gpu is not None:
        yield f"GPU memory: {_memory(trial.device)}; the card has {_has(on_gpu)}"
    each = f" for each of {ranks.here} ranks" if ranks.here > 1 else ""
    yield f"memory: {_memory(host)}{each}; {_has(free)} are free"
    parts = ", ".join(f"{name} {_needs(size)}" for name, size in disk.items())
    yield f"disk: {_needs(sum(disk.values()))} ({parts}); {_has(_free_disk(config.output_path))} are free"
    total = sum(seconds.values())
    longest = sorted(seconds, key=lambda part: -seconds[part])
    shown = ", ".join(f"{part} {in_words(seconds[part])}" for part in longest)
    ends = " at most" if config.training.stop_when == "auto" else ""
    yield f"time: {in_words(total)}{ends} ({shown}){_and_audit(config, trial)}"
    yield (
        f"measured here with {trial.steps} steps of {trial.config.ensemble.num_shards} "
        f"clone{'s' * (trial.config.ensemble.num_shards > 1)}, {trial.step_seconds / trial.steps:.2g} s each"
    )


def _and_audit(config: Config, trial: Trial) -> str:
    if not config.audit.audit:
        return ""
    drawing = estimate.drawing_for_audit(config, trial)
    what = (
        f"its {config.audit.num_images:,} images alone take {in_words(drawing)} to draw" if drawing else "unmeasured"
    )
    return f"; the audit comes on top: {what}"


def _memory(phases: Mapping[str, int]) -> str:
    """The highest, and where it is."""
    most = estimate.at_most(phases)
    where = next((phase for phase, size in phases.items() if size == most), "")
    others = ", ".join(f"{phase} {_needs(size)}" for phase, size in phases.items() if phase not in (where, "starting"))
    return f"{_needs(most)} at most, while {where} ({others})"


def _too_little(
    host: Mapping[str, int],
    device: Mapping[str, int],
    disk: Mapping[str, int],
    free: int,
    on_gpu: int | None,
    ranks: NumRanks,
    output: Path,
) -> Iterator[str]:
    """What there is not enough of."""
    needed = ranks.here * estimate.at_most(host)
    if needed > free:
        yield f"the memory does not suffice: {_needs(needed)} are needed and {_has(free)} are free"
    if on_gpu is not None and estimate.at_most(device) > 0.95 * on_gpu:
        yield f"the GPU has hardly enough memory: {_needs(estimate.at_most(device))} of {_has(on_gpu)} are needed"
    if sum(disk.values()) > (there := _free_disk(output)):
        yield (
            f"the disk does not suffice: {_needs(sum(disk.values()))} are needed and {_has(there)} are free: fewer "
            "checkpoints are kept with `--checkpoints_total_limit 1`"
        )


def _needs(size: int) -> str:
    return gigabytes(size, math.ceil)


def _has(size: int) -> str:
    return gigabytes(size, math.floor)


def _free_disk(output: Path) -> int:
    """Bytes where the folder is or will be."""
    there = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free
