"""What a run shares with the one whose checkpoint it goes on from, and the disk space that its own will take."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ..config.config import Config
from ..config.identity import check_identity, free_settings
from ..config.settings import ValidationConfig
from ..distributed.groups import Ranks
from ..ensemble.checkpoint import Checkpoint, CheckpointStore
from ..environment import differences, environment
from ..errors import UserError, warn
from .assembly import Run
from .data import Data
from .model import Model


def open_checkpoint(store: CheckpointStore, ranks: Ranks, resume: str | None) -> Checkpoint | None:
    """The checkpoint to go on from, which rank 0 looks for and all open; None to start over.

    Args:
        resume: `--resume_from_checkpoint`.
    """
    found = store.find(resume) if resume is not None and ranks.is_main else None
    path = ranks.all_gather_object(str(found.path) if found is not None else None)[0]
    return found if found is not None or path is None else store.open(Path(path))


def manifest_facts(config: Config, run: Run) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run besides its position."""
    return {
        "looks": run.stopping.state(),
        "identity": run.identity,
        "settings": free_settings(config, run.accelerator.mixed_precision),
        "pictures": drawn_with(config.validation),
        "environment": environment(),
    }


def drawn_with(settings: ValidationConfig) -> dict[str, Any]:
    """The settings that decide what validation images look like, in types of JSON."""
    return {**dataclasses.asdict(settings), "validation_prompts": list(settings.validation_prompts)}


def restore(checkpoint: Checkpoint, config: Config, data: Data, run: Run) -> None:
    """Puts the ensemble where the checkpoint was written; warns of settings that have changed since.

    Raises:
        UserError: it was written by another run, or lies beyond the end of this one.
    """
    saved, current = checkpoint.manifest, manifest_facts(config, run)
    check_identity(saved["identity"], current["identity"], str(checkpoint.path))
    for facts in ("settings", "environment"):
        for line in differences(saved[facts], current[facts]):
            if run.ranks.is_main:
                warn(f"resuming, but {line}: the weights may differ from those of a run without a stop")
    run.ensemble.restore(checkpoint)
    run.lender.restore(checkpoint)
    run.stopping.load(saved)
    steps = run.ensemble.steps
    if any(done > total for done, total in zip(steps, data.schedule.total_steps, strict=True)):
        raise UserError(
            f"cannot resume from {checkpoint.path}: it is {max(steps)} steps of a clone into the run, and "
            "`--num_train_epochs`, `--max_train_steps` or `--total_train_steps` ask for fewer. Raise them, or "
            "choose an older one."
        )


def after_a_break(store: CheckpointStore) -> str:
    """What to try after a loss or gradient that was not finite."""
    if not (saved := store.all()):
        return (
            "Nothing was saved yet: lower `--learning_rate` or use `--mixed_precision no`, and start over in another "
            "`--output_dir`"
        )
    *older, newest = saved
    go_back = f"; if that breaks too, with `--resume_from_checkpoint {older[-1].name}`" if older else ""
    return (
        f"The last good weights are saved in {newest}: lower `--learning_rate` or use `--mixed_precision no`, and go "
        f"on with `--resume_from_checkpoint latest`{go_back}"
    )


def space_needed(model: Model, run: Run) -> int:
    """Bytes on disk of one checkpoint, when it is largest, and of the finished pipeline.

    With `--stop_when auto` another checkpoint is kept, that of the best round.
    """
    components = model.family.pipeline.components.values()
    modules = [component for component in components if isinstance(component, torch.nn.Module)]
    checkpoints = 1 if run.stopping.patience is None else 2
    return checkpoints * run.need.checkpoint + sum(
        parameter.nbytes for module in modules for parameter in module.parameters()
    )
