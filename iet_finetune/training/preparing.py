"""What a run has before its first step: everything assembled, a checkpoint restored, and the output folder ready."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from ..audit.flags import check_audit
from ..config.config import Config
from ..config.identity import check_flags
from ..distributed.groups import Ranks
from ..ensemble.checkpoint import Checkpoint, CheckpointStore
from ..errors import warn
from ..publish import outputs
from ..publish.hub import check_push
from .assembly import Run, assemble
from .data import Data
from .model import Model
from .overview import doubts, write_unreadable
from .reporting import Reporter
from .resuming import drawn_with, open_checkpoint, restore, space_needed
from .tracking import Trackers
from .validation import Validation


@dataclass(frozen=True)
class Prepared:
    """A run that may begin, or go on.

    Attributes:
        total_rounds: those that are done, and those still to be done.
    """

    store: CheckpointStore
    data: Data
    model: Model
    run: Run
    reporter: Reporter
    validation: Validation
    total_rounds: int


def prepare(
    config: Config,
    accelerator: Accelerator,
    ranks: Ranks,
    objects: Mapping[str, Any],
    entering: Callable[[str], None],
) -> Prepared:
    """Makes everything ready. Every rank takes part; the output folder is the main one's.

    Args:
        objects: what the caller passed in place of what flags name; see `assemble`.
        entering: is told of each phase; see `Callback.on_phase`.

    Raises:
        UserError: whatever the user can mend.
    """
    output = config.output_path
    if config.hub.push_to_hub and ranks.is_main:
        check_push(output, config.hub)
    if config.audit.audit and ranks.is_main:
        check_audit(config)
    store = CheckpointStore(output, config.checkpoint.checkpoints_total_limit, ranks)
    checkpoint = open_checkpoint(store, ranks, config.checkpoint.resume_from_checkpoint)
    if checkpoint is not None and config.prior.is_on:
        # Class images that are drawn with other flags would be there to stay.
        check_flags(checkpoint.manifest["identity"], config, str(checkpoint.path))
    data, model, run = assemble(config, accelerator, ranks, **objects, entering=entering)
    if checkpoint is not None:
        restore(checkpoint, config, data, run)
        run.stopping.forget(lambda look: not store.has(look.step))
    ensemble = run.ensemble
    # All steps may be done and the merge not.
    rounds = ensemble.round + max(data.schedule.remaining_rounds(ensemble.steps), int(ensemble.in_midst_of_round))
    if ranks.is_main:
        _prepare_folder(config, data, model, run, store, checkpoint)
    ranks.barrier()
    project = config.logging.tracker_project_name or output.absolute().name
    trackers = Trackers(accelerator, project, config.to_flags())
    validation = Validation(config, model.family, trackers, rounds, model.prompts, is_main=ranks.is_main)
    drawn_alike = checkpoint is not None and checkpoint.manifest["pictures"] == drawn_with(config.validation)
    validation.forget(ensemble.round if drawn_alike else -1)
    return Prepared(store, data, model, run, Reporter(output, ranks.is_main, trackers), validation, rounds)


def _prepare_folder(
    config: Config, data: Data, model: Model, run: Run, store: CheckpointStore, checkpoint: Checkpoint | None
) -> None:
    output = config.output_path
    outputs.check_space(output, space_needed(model, run))
    if idle := run.placement.idle():
        warn(
            f"`--num_shards {len(run.ensemble.clones)}` on {run.ranks.size} ranks: "
            f"{', '.join(f'rank {rank}' for rank in idle)} will have nothing to do in the last part of every round"
        )
    if config.logging.report_to != "none":
        outputs.make_logging_folder(output / config.logging.logging_dir)
    if checkpoint is not None:
        store.go_back_to(checkpoint)
    outputs.write_config(output, config)
    write_unreadable(output, data.images)
    for line in doubts(config, data.images, data.schedule, model.family):
        warn(line)
