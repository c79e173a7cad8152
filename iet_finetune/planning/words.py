"""A plan in words."""

import math
from collections.abc import Iterator, Mapping

from ..config.config import Config
from ..files import gigabytes
from ..training.run_words import in_words
from .plan import Plan

# The share of the GPU's memory from which on it may not be enough: the allocator and the driver take some, too.
_FULL = 0.95


def lines(config: Config, plan: Plan) -> Iterator[str]:
    """What the run does, needs and takes."""
    yield from plan.about
    machine, trial = plan.machine, plan.trial
    if machine.gpu is not None:
        yield f"GPU memory: {_by_phase(plan.device)}; the card has {_has(machine.gpu)}"
    each = f" for each of {machine.ranks.here} ranks" if machine.ranks.here > 1 else ""
    kept = trial.needs.run.memory(
        device_is_host=machine.gpu is None, offloaded=config.ensemble.offload_dir is not None
    )
    clones = f"{_needs(kept)} in training are clones, their sum and their optimizer states"
    yield f"memory: {_by_phase(plan.host)}{each}; {clones}; {_has(machine.memory)} are free"
    parts = ", ".join(f"{name} {_needs(size)}" for name, size in plan.disk.items())
    yield f"disk: {_needs(sum(plan.disk.values()))} ({parts}); {_has(machine.disk)} are free"
    if plan.cache:
        yield f"cache: {_needs(plan.cache)} of encoded images and captions, what is there already included"
    longest = sorted(plan.seconds, key=lambda part: -plan.seconds[part])
    shown = ", ".join(f"{part} {in_words(plan.seconds[part])}" for part in longest)
    ends = " at most" if config.training.stop_when == "auto" else ""
    yield f"time: {in_words(sum(plan.seconds.values()))}{ends} ({shown}){_and_audit(config, plan)}"
    tried = trial.config.ensemble.num_shards
    of = f"{trial.steps} steps of {tried} clone{'s' * (tried > 1)}"
    yield f"measured here with {of}, {trial.step_seconds / trial.steps:.2g} s each"


def doubts(plan: Plan) -> Iterator[str]:
    """What makes little sense, and what is too scarce."""
    yield from plan.doubts
    machine, device, disk = plan.machine, max(plan.device.values(), default=0), sum(plan.disk.values())
    memory = machine.ranks.here * max(plan.host.values())
    if memory > machine.memory:
        yield f"there is not enough memory: {_needs(memory)} are needed and {_has(machine.memory)} are free"
    if machine.gpu is not None and device > _FULL * machine.gpu:
        yield f"the GPU may not have enough memory: {_needs(device)} of {_has(machine.gpu)} are needed"
    if disk > machine.disk:
        yield (
            f"there is not enough disk space: {_needs(disk)} are needed and {_has(machine.disk)} are free. To keep "
            "fewer checkpoints, give `--checkpoints_total_limit 1`"
        )


def _and_audit(config: Config, plan: Plan) -> str:
    if not config.audit.audit:
        return ""
    images = f"{config.audit.num_images:,} images"
    how_long = f", which takes {in_words(plan.drawing)} to draw its {images} alone" if plan.drawing else ""
    return f"; add the audit{how_long}"


def _by_phase(phases: Mapping[str, int]) -> str:
    """The highest, and where it is."""
    where = max(phases, key=lambda phase: phases[phase])
    others = ", ".join(f"{phase} {_needs(size)}" for phase, size in phases.items() if phase not in (where, "starting"))
    return f"{_needs(phases[where])} at most, while {where} ({others})"


def _needs(size: int) -> str:
    return gigabytes(size, math.ceil)


def _has(size: int) -> str:
    return gigabytes(size, math.floor)
