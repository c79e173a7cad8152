"""What is left to do when all rounds are done: save, write the records, audit, push."""

import shlex
from collections.abc import Callable
from pathlib import Path

import torch

from ..config.config import Config
from ..ensemble.ledger import write_ledger
from ..environment import environment
from ..errors import UserError
from ..families import move_pipeline
from ..files import LEDGER
from ..publish import outputs
from ..publish.card import CardFacts, base_license, write_model_card
from ..publish.hub import push
from ..publish.result import Result
from .assembly import Run
from .data import Data
from .model import Model
from .overview import doubt_of_rule
from .reporting import METRICS
from .tracking import read_lines

NONE_HELD_OUT = (
    "no images were held out, so an audit cannot tell memory from chance unless you give it similar images with "
    "`--holdout_data_dir`"
)
# Rounds whose skip rates are printed, at most.
MOST_RATES = 12


def finish(
    config: Config,
    data: Data,
    model: Model,
    run: Run,
    sample_grid: Path | None,
    entering: Callable[[str], None],
) -> None:
    """Saves the pipeline, the ledger and the model card; audits and pushes them if asked to. For rank 0 alone.

    Args:
        run: its ensemble holds the state of all clones.
        sample_grid: the validation images of the first and last round side by side, or None.
        entering: is told of each phase; see `Callback.on_phase`.

    Raises:
        UserError: no space left, or the audit or the push failed; the pipeline is saved nevertheless.
    """
    entering("saving")
    output = config.output_path
    run.ensemble.load_result()
    result = _result(config, data, model, run)
    with outputs.audit_of_other_weights_removed(output):
        outputs.publish(output, result.save)
    about = run.ensemble.clones[0].rule.about_images()
    ledgers = [clone.ledger for clone in run.ensemble.clones]
    write_ledger(output / LEDGER, data.images, data.heldout, data.left_out, data.indices, ledgers, about)
    skip_rates = tuple(line["skip_rate"] for line in read_lines(output / METRICS))
    write_model_card(output, _card_facts(config, data, model, run, skip_rates, sample_grid, result))
    if not run.ensemble.clones[0].rule.is_off:
        doubt = None if config.is_smoke else doubt_of_rule(config, data.schedule, model.family)
        print(_skipped(skip_rates, doubt))
    if (regret := run.stopping.regret()) is not None:
        print(regret)
    if not len(data.watched) and not config.is_smoke:
        print(NONE_HELD_OUT)
    _print_summary(output, sample_grid, result)
    if config.audit.audit:
        entering("auditing")
        _audit(output, model, run)
    if config.hub.push_to_hub:
        print(f"pushed to {push(output, config.hub)}")


def save_round(config: Config, data: Data, model: Model, run: Run, *, again: bool) -> None:
    """Saves the pipeline or LoRA file of the round that has been merged, if it is to be. For rank 0 alone.

    Args:
        again: whether it has been trained just now; otherwise what is there of it stays.
    """
    every, round_ = config.checkpoint.save_every_rounds, run.ensemble.round
    if every is None or round_ == 0 or round_ % every:
        return

    def save(folder: Path) -> None:
        run.ensemble.load_result()
        _result(config, data, model, run).save_copy(folder)

    outputs.publish_round(config.output_path, round_, save, again=again)


def _result(config: Config, data: Data, model: Model, run: Run) -> Result:
    by_class = data.images.classes is not None
    return Result(model.family, model.adapter, model.source, by_class, run.accelerator, config)


def _card_facts(
    config: Config,
    data: Data,
    model: Model,
    run: Run,
    skip_rates: tuple[float, ...],
    sample_grid: Path | None,
    result: Result,
) -> CardFacts:
    source, images = model.source, data.images
    # Of a pipeline that was passed as an object no name is known.
    in_memory = source.folder is None and config.model.model_config is None
    return CardFacts(
        base_model="" if in_memory else config.model.pretrained_model_name_or_path,
        # The licence of a configuration is not that of a checkpoint.
        base_license=base_license(source.folder) if source.folder is not None and source.file is None else None,
        pipeline_class=source.class_name,
        flags=config.to_flags(),
        num_images=len(images),
        num_distinct_images=len(images) - images.num_duplicates,
        num_heldout=len(data.heldout),
        num_left_out=len(data.left_out.images),
        rounds=run.ensemble.round,
        steps=run.ensemble.step,
        skip_rates=skip_rates,
        sample_grid=sample_grid.relative_to(config.output_path).as_posix() if sample_grid is not None else None,
        versions=environment()["versions"],
        lora_export=result.words,
        class_names=images.class_names,
        absent=source.absent,
        saved_as=source.saved_as,
        init_lora_rank=model.beginning.rank if model.beginning is not None else None,
        num_class_images=len(data.beside.images) if data.beside is not None else 0,
        num_class_images_drawn=data.beside.drawn if data.beside is not None else 0,
    )


def _skipped(rates: tuple[float, ...], doubt: str | None) -> str:
    """What the skip rule did; `doubt` is why it could hardly act, if that is so."""
    if any(rates):
        shown = [f"{rate:.1%}" for rate in rates]
        if len(rates) > MOST_RATES:
            half, mean = MOST_RATES // 2, sum(rates) / len(rates)
            shown = [*shown[:half], "...", *shown[-half:], f"({mean:.1%} on average; {METRICS} has all)"]
        return f"skipped by round: {' '.join(shown)}"
    return "nothing was skipped in any round" + (f". {doubt}" if doubt else ": the rule found nothing to skip")


def _print_summary(output: Path, sample_grid: Path | None, result: Result) -> None:
    if sample_grid is not None:
        print(f"before and after: {sample_grid}")
    if result.words is not None:
        print(f"saved as {result.words}")
        if (other := result.other_forms(output)) is not None:
            print(other)
    print(f"load it with: {result.how_to_load(output)}", flush=True)


def _audit(output: Path, model: Model, run: Run) -> None:
    """Measures what was saved, loaded as a user loads it, and puts the metrics into the card."""
    move_pipeline(model.family.pipeline, torch.device("cpu"))
    run.ensemble.release()
    run.lender.release()
    # Packages that only an audit needs are imported where there is one.
    from ..publish.audited import audit_model

    try:
        print(audit_model(output, run.accelerator.device), flush=True)
    except UserError as error:
        raise UserError(
            f"{error} The finished pipeline is saved in `{output}`; audit it with: "
            f"iet-finetune audit --model {shlex.quote(str(output))}"
        ) from None
