"""The first lines of a run: what it has, what it will do with it, and what of that makes little sense."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config.config import Config
from ..config.registry import SKIP_RULES
from ..data.about import (
    buckets_in_words,
    count_in_words,
    cut_in_words,
    doubts_of_captions,
    doubts_of_pixels,
    sizes_in_words,
)
from ..data.dataset import TrainingImages
from ..families import Family
from ..method.rules import SkipRule
from ..method.schedule import Schedule
from .class_images import ClassImages
from .data import Found
from .tracking import tensorboard_command

UNREADABLE = "unreadable_images.txt"


def overview(
    config: Config, found: Found, schedule: Schedule, family: Family, beside: ClassImages | None = None
) -> Iterator[str]:
    """What a run has and does, in lines.

    Args:
        beside: its class images, once they are there.
    """
    images = found.images
    distinct = len(images) - images.num_duplicates
    count = count_in_words(len(images), distinct, "distinct")
    others = "" if found.watched is found.heldout else f", {len(found.watched)} others to compare with"
    yield f"images: {count}, {sizes_in_words(images)}; {len(found.heldout) or 'none'} held out{others}"
    if not len(found.watched) and not config.is_smoke:
        yield (
            "held out: none, so nothing tells when to stop, and an audit cannot tell memory from chance; "
            "`--holdout_fraction 0.1` holds some out, or `--holdout_data_dir` names others"
        )
    yield from images.notes
    if images.unreadable:
        yield f"left out {len(images.unreadable)} images that cannot be read, listed in {UNREADABLE}"
    if len(found.left_out.images):
        yield found.left_out.words
    if beside is not None:
        yield f"class images: {beside.words}"
    if family.reader is not None:
        yield f"captions: {_captions(images, family)}"
    buckets = family.buckets(config.data)
    if (sizes := buckets_in_words(images, buckets)) is not None:
        yield f"sizes: {sizes}"
    if (cut := cut_in_words(images, buckets)) is not None:
        yield f"crops: {cut}"
    at_most = "at most " if config.training.stop_when == "auto" else ""
    yield f"steps: {at_most}{_steps(schedule)}"
    yield f"output: {config.output_path} (open run.html there to see how it goes)"
    if (command := tensorboard_command(config)) is not None:
        yield f"curves: {command}"


def doubts(config: Config, images: TrainingImages, schedule: Schedule, family: Family) -> Iterator[str]:
    """What makes little sense, in lines, each with a reason; `--smoke` is to make none."""
    if config.is_smoke:
        return
    yield from doubts_of_pixels(images, family.buckets(config.data))
    if family.needs_captions and config.data.usual_caption is None:
        yield from doubts_of_captions(images)
    doubt = doubt_of_rule(config, schedule, family)
    if doubt is not None:
        yield doubt


def doubt_of_rule(config: Config, schedule: Schedule, family: Family) -> str | None:
    """Why the skip rule can hardly act in this run; None if it can."""
    rule, settings, visits, size = _rule_of(config, schedule)
    return rule.doubt(settings, family.objective, visits, size)


def outlook_of_rule(config: Config, schedule: Schedule, family: Family) -> str | None:
    """What the skip rule will see in this run; None if there is nothing to say."""
    rule, settings, visits, size = _rule_of(config, schedule)
    return rule.outlook(settings, family.objective, visits, size)


def _rule_of(config: Config, schedule: Schedule) -> tuple[type[SkipRule], Any, int, int]:
    """The run's skip rule, its settings, and the visits and images of the clone that sees the fewest samples."""
    entry, settings = config.chosen(SKIP_RULES)
    visits, size = min((schedule.visits(shard), size) for shard, size in enumerate(schedule.shard_sizes))
    return entry.load(), settings, visits, size


def write_unreadable(output: Path, images: TrainingImages) -> None:
    """Writes down which images were left out because they cannot be read: a line each, and why."""
    file = output / UNREADABLE
    if images.unreadable:
        file.write_text("".join(f"{name}\t{why}\n" for name, why in images.unreadable), encoding="utf-8")
    else:
        file.unlink(missing_ok=True)


def _captions(images: TrainingImages, family: Family) -> str:
    texts = list(dict.fromkeys(text for captions in images.captions for text in captions))
    words = f"{len(texts)} distinct"
    found = family.caption_lengths(texts)
    if found is None or not found[0]:
        return words
    lengths, limit = found
    are = "is" if len(lengths) == 1 else "are"
    return (
        f"{words}; {len(lengths)} {are} longer than the {limit} tokens that the text encoder reads (by up to "
        f"{max(lengths) - limit}) and {are} cut off there"
    )


def _steps(schedule: Schedule) -> str:
    clones, total = len(schedule.shard_sizes), sum(schedule.total_steps)
    rounds = max(-(-steps // each) for steps, each in zip(schedule.total_steps, schedule.round_steps, strict=True))
    visits = [schedule.visits(shard) / size for shard, size in enumerate(schedule.shard_sizes)]
    often = f"{min(visits):.3g}" if max(visits) - min(visits) < 0.5 else f"{min(visits):.3g} to {max(visits):.3g}"
    each = f"{schedule.total_steps[0]} of each of {clones} clones, " if clones > 1 else ""
    return (
        f"{total} ({each}{rounds} round{'s' * (rounds > 1)}); each image is visited {often} time{'s' * (often != '1')}"
    )
