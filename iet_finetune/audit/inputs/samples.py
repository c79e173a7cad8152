"""The generated images: drawn with fixed prompts and seeds, and kept."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...config.config import Config
from ...data.dataset import TrainingImages
from ...errors import UserError, one_line
from ...files import clean, remove_folder, written_beside
from .batches import in_parts, rows_together
from .subject import Subject
from .work import Work

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Plan:
    """What is drawn: image i from `prompts[i]`, or class `classes[i]`, and the noise of `seed + i`.

    Attributes:
        guidance: None leaves it to the pipeline.
        scheduler: its class.
        model: fingerprint of the pipeline.
        precision: `no`, `bf16` or `fp16`.
        options: see `Subject.options`.
    """

    prompts: tuple[str, ...]
    classes: tuple[int, ...]
    seed: int
    steps: int
    guidance: float | None
    size: int
    scheduler: str
    model: str
    precision: str
    batch: int
    options: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """Everything an image depends on, whatever the number of images, in types of JSON."""
        values = asdict(self)
        options = values.pop("options")
        return {name: value for name, value in values.items() if name not in ("prompts", "classes")} | options


def plan_samples(config: Config, subject: Subject, training: TrainingImages, heldout: TrainingImages) -> Plan:
    """The prompts (or classes) of all images, and how they are drawn.

    The distinct captions are shuffled by the seed and repeated until there are enough.

    Raises:
        UserError: there are no such prompts.
    """
    audit, size = config.audit, config.data.resolution
    prompts = _prompts(config, subject, training, heldout)
    classes = _classes(config, subject, training, heldout)
    order = np.random.default_rng([config.training.seed, 1])

    def spread(values: Sequence[Any]) -> tuple[Any, ...]:
        mixed = order.permutation(len(values))
        return tuple(values[mixed[i % len(values)]] for i in range(audit.num_images))

    return Plan(
        spread(prompts),
        spread(classes),
        config.training.seed,
        audit.num_inference_steps,
        audit.sampling_guidance_scale,
        size,
        type(subject.pipeline.scheduler).__name__,
        subject.fingerprint,
        subject.precision,
        audit.eval_batch_size,
        subject.options,
    )


def distinct_captions(images: TrainingImages) -> list[str]:
    """The distinct captions, in the order of the data."""
    return list(dict.fromkeys(caption for captions in images.captions for caption in captions))


def _prompts(config: Config, subject: Subject, training: TrainingImages, heldout: TrainingImages) -> list[str]:
    wanted = config.audit.prompts
    if not subject.takes_prompts:
        if wanted not in ("train", "heldout", "none"):
            raise UserError(f"`--prompts {wanted}`: a {subject.class_name} takes no prompts: leave it out.")
        return [""]
    if wanted == "none":
        return [""]
    if wanted not in ("train", "heldout"):
        return read_prompts(wanted)
    prompts = distinct_captions(heldout if wanted == "heldout" else training)
    if not prompts:
        raise UserError(f"`--prompts {wanted}`: there are no such images. Give them, or a file of prompts.")
    return prompts


def read_prompts(file: str) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        UserError: it cannot be read, or has none.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"`--prompts {file}` is none of train, heldout and none, and no file that can be read: {one_line(error)}."
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"`--prompts {file}` has no prompts: put one on each line.")
    return prompts


def _classes(config: Config, subject: Subject, training: TrainingImages, heldout: TrainingImages) -> list[int]:
    images = heldout if config.audit.prompts == "heldout" else training
    if not subject.takes_classes:
        return [0]
    if not images.classes:
        raise UserError("the model draws by class: say with `--class_column COLUMN` which class each image is of.")
    return sorted(set(images.classes))


def draw_samples(subject: Subject, plan: Plan, folder: Path, work: Work, *, own: bool) -> list[Path]:
    """Draws the images that are missing, and returns the files of all.

    Args:
        own: whether the folder belongs to this model alone; then images of its earlier weights are removed.

    Raises:
        UserError: the folder holds images that were drawn with other settings.
    """
    files = [folder / f"{number:06d}.png" for number in range(len(plan.prompts))]
    _claim(folder, plan, own)
    there = sum(file.is_file() for file in files)
    batches = list(in_parts(range(len(files)), plan.batch))
    # Draw the whole batch again: the last bits of an image may depend on its batch.
    due = [numbers for numbers in batches if not all(files[number].is_file() for number in numbers)]
    with work.progress("drawing", len(files), there) as advance:
        for part in in_parts(due, rows_together(plan.batch, subject.travels) // plan.batch):
            calls = [partial(_drawn, subject, plan, numbers) for numbers in part]
            with subject.drawing(calls):
                for numbers, call in zip(part, calls, strict=True):
                    missing = sum(not files[number].is_file() for number in numbers)
                    _save(call(), [files[number] for number in numbers])
                    advance(missing)
    return files


def _drawn(subject: Subject, plan: Plan, numbers: Sequence[int]) -> list[Image.Image]:
    return subject.draw(
        [plan.prompts[number] for number in numbers],
        [plan.classes[number] for number in numbers],
        [torch.Generator().manual_seed(plan.seed + number) for number in numbers],
        steps=plan.steps,
        guidance=plan.guidance,
        size=plan.size,
    )


def _save(images: list[Image.Image], files: list[Path]) -> None:
    for file, image in zip(files, images, strict=True):
        with written_beside(file) as partial_file:
            image.save(partial_file, format="PNG")


def _claim(folder: Path, plan: Plan, own: bool) -> None:
    """Creates the folder, or checks that its images belong to this plan."""
    settings = plan.settings() | {"prompts": list(plan.prompts), "classes": list(plan.classes)}
    before = _read(file := folder / SETTINGS)
    if own and before and before.get("model") != plan.model:
        remove_folder(folder)
        before = {}
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    for name, value in settings.items() if before else ():
        if not _goes_on(before.get(name), value):
            shown = "" if name in ("model", "prompts", "classes") else f" ({before.get(name)} then, {value} now)"
            raise UserError(
                f"`{folder}` holds images of another {name}{shown}: choose another `--output_dir`, or remove them."
            )
    with written_beside(file) as partial:
        partial.write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"`{file}` is damaged: {one_line(error)}. Remove its folder, and the images in it.") from None


def _goes_on(before: Any, now: Any) -> bool:
    """Whether two settings agree; of two lists, one may continue the other."""
    if isinstance(before, list) and isinstance(now, list):
        common = min(len(before), len(now))
        return before[:common] == now[:common]
    return bool(before == now)
