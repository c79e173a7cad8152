"""`iet-finetune plan`: what a run would do, need and take."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..config.config import Config
from ..distributed.placement import Placement
from ..ensemble.budget import available_memory
from ..errors import UserError
from ..families import family_class, find_pipeline
from ..training.data import MOST_WATCHED, find_images, schedule_of, split
from ..training.overview import doubt_of_rule, doubts, outlook_of_rule, overview
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


@dataclass(frozen=True)
class Machine:
    """What there is for a run, in bytes.

    Attributes:
        memory, disk: free now, the latter where the output goes.
        gpu: of the first GPU; None without one.
        ranks: those that share it.
    """

    memory: int
    disk: int
    gpu: int | None
    ranks: NumRanks

    @classmethod
    def this_one(cls, output: Path, ranks: NumRanks) -> "Machine":
        """As it is now, before anything is loaded."""
        there = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
        return cls(available_memory(), shutil.disk_usage(there).free, first_device().memory, ranks)


@dataclass(frozen=True)
class Plan:
    """What a run would be like; `planning.words` has it in words.

    Attributes:
        about: lines on what it has and does.
        doubts: what of that makes little sense, each with a reason.
        seconds: of its parts, the audit left out.
        drawing: seconds for the images of its audit, 0 without one or where that was not measured.
        host: bytes of this machine's memory for a rank, in each phase.
        device: of the GPU's, without what the allocator and other programs keep; {} without one.
        disk: bytes of what is written to the output folder.
        cache: bytes of encoded images and captions, those included that are there already; 0 without a cache.
        machine: what there is.
        trial: what was measured.
    """

    about: list[str]
    doubts: list[str]
    seconds: dict[str, float]
    drawing: float
    host: dict[str, int]
    device: dict[str, int]
    disk: dict[str, int]
    cache: int
    machine: Machine
    trial: Trial


def make_plan(config: Config, ranks: NumRanks = ALONE) -> Plan:
    """Looks at the images, and trains a little on some of them to measure; nothing is left but what is cached.

    Raises:
        UserError: whatever the user can mend.
    """
    if config.training.smoke:
        raise UserError("`--smoke` tries a recipe on a tiny model, of which no plan is made: leave it out.")
    placement = Placement.plan(config.ensemble.num_shards, ranks.all)
    source, machine = find_pipeline(config.model), Machine.this_one(config.output_path, ranks)
    found = find_images(config, family_class(source, config.model).needs_captions)
    indices = split(config, found.images)
    trial = try_out(config, found, placement)
    assert trial.family is not None
    schedule = schedule_of(config, found.images, indices, trial.family.buckets(config.data))
    about = [*source.notes, *overview(config, found, schedule, trial.family)]
    if doubt_of_rule(config, schedule, trial.family) is None:
        seen = outlook_of_rule(config, schedule, trial.family)
        about.append(f"skip rule: {config.training.skip_rule}{f', which can act: {seen}' if seen else ''}")
    watched = found.watched.subset(range(min(len(found.watched), MOST_WATCHED)))
    num_class_images = config.prior.num_class_images if config.prior.is_on else 0
    in_files = config.ensemble.offload_dir is not None
    return Plan(
        about,
        list(doubts(config, found.images, schedule, trial.family)),
        estimate.seconds(config, trial, schedule, placement, len(found.images) + num_class_images),
        estimate.drawing_for_audit(config, trial) if config.audit.audit else 0.0,
        estimate.memory(trial, device_is_host=machine.gpu is None, offloaded=in_files),
        trial.device,
        estimate.disk(config, trial, schedule.remaining_rounds([0] * len(schedule.shard_sizes))),
        estimate.cache(trial, (found.images, watched)),
        machine,
        trial,
    )
