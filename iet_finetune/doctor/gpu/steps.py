"""Does the host wait for the device within a step?"""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ...families.quiet import quiet_loading
from ...families.tiny import RESOLUTION, TINY
from ...training.callbacks import Callback, StepFacts
from ..checks import Machine, expect
from ..trials import UnsavedTrainer, fresh_accelerator, pictures, settings

# The first steps make what lasts: optimizer state, cuDNN's choices.
_SETTLED, _STEPS = 3, 7


class _Watch(Callback):
    """Between settled steps, lets torch warn of each operation that waits for the device."""

    def __init__(self, card: bool) -> None:
        self.card, self.steps = card, 0

    def end(self) -> None:
        """Stops watching, wherever the run was."""
        if self.card:
            torch.cuda.set_sync_debug_mode("default")

    def on_step_end(self, facts: StepFacts) -> None:
        """Watches what comes after the first steps, up to the last but one."""
        self.steps += 1
        if self.card:
            # The last step is read back for the log.
            watched = _SETTLED <= self.steps < _STEPS - 1
            torch.cuda.set_sync_debug_mode("warn" if watched else "default")


def steps(machine: Machine, found: dict[str, Any]) -> None:
    """Trains each tiny family for some steps, and lists the lines of code at which the host waited."""
    precisions = ("no", "bf16", "fp16") if machine.has_card else ("no",)
    images, waits, errors, done = pictures(8, RESOLUTION), Counter[str](), Counter[str](), 0
    # Without a card there is nothing to wait for: this only shows that the check works.
    names = TINY if machine.has_card else ("StableDiffusionPipeline", "FluxPipeline")
    for name in names:
        for use_lora in (False, True):
            for precision in precisions:
                torch.manual_seed(0)
                with quiet_loading():
                    pipeline = TINY[name]()
                label = f"{name.removesuffix('Pipeline')}{' LoRA' if use_lora else ''} {precision}"
                try:
                    lines = _waits(machine, pipeline, images, use_lora, precision)
                except Exception as error:
                    errors[f"{label}: {type(error).__name__} {error}"[:300]] += 1
                    continue
                done += 1
                waits.update(f"{line} ({label})" for line in lines)
    found["runs"] = done
    found["waits"] = len(waits)
    if waits or errors:
        found["where"] = sorted({line.split(" (")[0] for line in waits})
        found["first of each"] = _first_of_each(waits)
        found["errors"] = sorted(errors)
    expect(not errors, f"{len(errors)} runs ended with an error")
    expect(not waits, "the host waits for the device within a step")


def _first_of_each(waits: Counter[str]) -> list[str]:
    first: dict[str, str] = {}
    for line in sorted(waits):
        first.setdefault(line.split(" (")[0], f"{line} x{waits[line]}")
    return list(first.values())


def _waits(machine: Machine, pipeline: Any, images: Dataset, use_lora: bool, precision: str) -> list[str]:
    """The lines at which the host waited, one for each time."""
    config = settings(
        machine.scratch / f"{len(list(machine.scratch.iterdir()))}",
        resolution=RESOLUTION,
        train_batch_size=2,
        max_train_steps=_STEPS,
        merge_every_steps=_STEPS,
        num_shards=1,
        **({"use_lora": True, "rank": 2} if use_lora else {}),
        use_ema=True,
        mixed_precision=precision,
        cache_dir=str(machine.scratch / "cache"),
    )
    watch = _Watch(machine.has_card)
    with fresh_accelerator(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            UnsavedTrainer(config, [watch], pipeline=pipeline, dataset=images).train_rounds()
        finally:
            watch.end()
    expect(watch.steps == _STEPS, f"{watch.steps} steps instead of {_STEPS}")
    return [
        f"{'/'.join(Path(each.filename).parts[-3:])}:{each.lineno}"
        for each in caught
        if "synchronizing CUDA operation" in str(each.message)
    ]
