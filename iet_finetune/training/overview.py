"""The first lines of a run: what it has, what it is going to do with it, and what of that makes little sense."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..config.config import Config
from ..config.registry import SKIP_RULES
from ..data.dataset import TrainingImages
from ..families import Family
from ..method.schedule import Schedule
from .data import Found

UNREADABLE = "unreadable_images.txt"


def overview(config: Config, found: Found, schedule: Schedule, family: Family) -> Iterator[str]:
    """What a run has and does, in lines."""
    images = found.images
    distinct = len(images) - images.num_duplicates
    yield f"images: {_count(len(images), distinct, 'distinct')}, {_sizes(images)}; {len(found.heldout)} held out"
    yield from images.notes
    if images.unreadable:
        yield f"left out {len(images.unreadable)} images that cannot be read, listed in {UNREADABLE}"
    if len(found.left_out.images):
        yield found.left_out.words
    if family.reader is not None:
        yield f"captions: {_captions(images, family)}"
    if (cut := _cut(images, config.data.resolution)) is not None:
        yield f"crops: {cut}"
    yield f"steps: {_steps(schedule)}"
    yield f"output: {config.output_path}"


def doubts(config: Config, images: TrainingImages, schedule: Schedule, family: Family) -> Iterator[str]:
    """What makes little sense, in lines, each with a reason; `--smoke` is to make none."""
    if config.training.smoke:
        return
    yield from _doubts_of_pixels(images, config.data.resolution)
    if family.needs_captions and config.data.default_caption is None:
        yield from _doubts_of_captions(images)
    entry, settings = config.chosen(SKIP_RULES)
    visits, size = min((_visits(schedule, shard), size) for shard, size in enumerate(schedule.shard_sizes))
    doubt = entry.load().doubt(settings, family.objective, visits, size)
    if doubt is not None:
        yield doubt


def _doubts_of_pixels(images: TrainingImages, resolution: int) -> Iterator[str]:
    if images.sizes is not None and (small := int((images.sizes.min(axis=1) * 2 < resolution).sum())):
        yield (
            f"{small} of {len(images)} images are less than half as large as `--resolution {resolution}`: they are "
            "blown up, and the model learns to draw blurred"
        )
    if images.narrow is not None and (narrow := int(images.narrow.sum())):
        yield (
            f"{narrow} of {len(images)} images fill a small part of the range from black to white, such as "
            f"`{images.names[int(np.argmax(images.narrow))]}`: look at whether they are what they should be"
        )


def _doubts_of_captions(images: TrainingImages) -> Iterator[str]:
    texts = {text.strip() for captions in images.captions for text in captions}
    if texts == {""}:
        yield "every caption is empty: the model is trained for the empty prompt alone"
    elif "" in texts:
        empty = sum(not any(text.strip() for text in captions) for captions in images.captions)
        yield f"{empty} of {len(images)} images have an empty caption alone: `--default_caption` gives them another"
    elif len(texts) == 1 and len(images) > 1:
        yield f"every image has the same caption, {next(iter(texts))!r:.60}: prompts will not tell them apart"


def write_unreadable(output: Path, images: TrainingImages) -> None:
    """Writes down which images were left out because they cannot be read: a line each, and why."""
    file = output / UNREADABLE
    if images.unreadable:
        file.write_text("".join(f"{name}\t{why}\n" for name, why in images.unreadable), encoding="utf-8")
    else:
        file.unlink(missing_ok=True)


def _count(number: int, among: int, what: str) -> str:
    return f"{number}" if number == among else f"{number} ({among} {what})"


def _sizes(images: TrainingImages) -> str:
    if images.sizes is None or not len(images):
        return "of unknown size"
    pixels = images.sizes.astype(np.int64).prod(axis=1)
    least, most = (f"{width} x {height}" for width, height in images.sizes[[pixels.argmin(), pixels.argmax()]])
    return f"{least} pixels" if least == most else f"{least} to {most} pixels"


def _captions(images: TrainingImages, family: Family) -> str:
    texts = list(dict.fromkeys(text for captions in images.captions for text in captions))
    words = f"{len(texts)} distinct"
    found = family.caption_lengths(texts)
    if found is None or not found[0]:
        return words
    lengths, limit = found
    return (
        f"{words}; {len(lengths)} are longer than the {limit} tokens that the text encoder reads, by "
        f"{max(lengths) - limit} at most, and are cut off there"
    )


def _cut(images: TrainingImages, resolution: int) -> str | None:
    """How much of the images is cut off to make them square; None if nothing is, or sizes are not known."""
    if images.sizes is None or not len(images):
        return None
    shares = 1 - images.sizes.min(axis=1) / images.sizes.max(axis=1)
    if not shares.any():
        return None
    return (
        f"{shares.mean():.0%} of the pixels are cut off to make {resolution} x {resolution} of them, "
        f"{shares.max():.0%} of `{images.names[int(shares.argmax())]}`"
    )


def _steps(schedule: Schedule) -> str:
    clones, total = len(schedule.shard_sizes), sum(schedule.total_steps)
    rounds = max(-(-steps // each) for steps, each in zip(schedule.total_steps, schedule.round_steps, strict=True))
    visits = [_visits(schedule, shard) / size for shard, size in enumerate(schedule.shard_sizes)]
    often = f"{min(visits):.3g}" if max(visits) - min(visits) < 0.5 else f"{min(visits):.3g} to {max(visits):.3g}"
    each = f"{schedule.total_steps[0]} of each of {clones} clones, " if clones > 1 else ""
    return f"{total} ({each}{rounds} round{'s' * (rounds > 1)}); each image is visited {often} times"


def _visits(schedule: Schedule, shard: int) -> int:
    """How many samples a clone sees in the whole run."""
    size, steps = schedule.shard_sizes[shard], schedule.total_steps[shard]
    passes, rest = divmod(steps, -(-size // schedule.samples_per_step))
    return passes * size + min(rest * schedule.samples_per_step, size)
