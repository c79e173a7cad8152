"""What tests of training share: runs that are cut short, runs on several ranks, and how results are compared."""

import json
import textwrap
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import Ended, run_ranks

from iet_finetune import Callback, Config, Trainer
from iet_finetune.training.callbacks import StepFacts


class Killed(BaseException):
    """Stands for a process that is gone."""


class AtStepEnd(Callback):
    """Passes what is known of each step to a function."""

    def __init__(self, action: Callable[[StepFacts], object]) -> None:
        self.on_step_end = action  # type: ignore[method-assign]  # that is all there is to it


def killed_after(steps: int) -> Callback:
    """Ends a run that has taken `steps` steps, before it does anything else."""
    taken = count(1)

    def die(facts: StepFacts) -> None:
        if next(taken) == steps:
            raise Killed

    return AtStepEnd(die)


def run_until(settings: Config, steps: int) -> Trainer:
    """Trains until the run has taken `steps` more steps, and then is gone without cleaning up."""
    trainer = Trainer(settings, callbacks=[killed_after(steps)])
    with pytest.raises(Killed):
        trainer.train()
    return trainer


def train_on_ranks(size: int, settings: Config, before: str = "") -> list[Ended]:
    """Trains on so many ranks; `before` are lines that each runs first, and that may fill its list `callbacks`."""
    environment = {"ACCELERATE_USE_CPU": "true", "FLAGS": json.dumps(settings.to_flags())}
    # What is told on stdout is for tests to read.
    body = f"""
sys.stdout = sys.stderr
from iet_finetune import Callback, Config, Trainer
callbacks = []
{textwrap.dedent(before)}
Trainer(Config.from_flags(**json.loads(os.environ["FLAGS"])), callbacks).train()
"""
    return run_ranks(body, size, environments={rank: {**environment, "LOCAL_RANK": str(rank)} for rank in range(size)})


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ, such as {different[0]}"


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= tolerance


def samples(world: Path):
    """(image tensor, caption) pairs, read without the package."""
    lines = (world / "data" / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    arrays = [np.asarray(Image.open(world / "data" / row["file_name"]).convert("RGB")) for row in rows]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255 * 2 - 1 for array in arrays]
    return list(zip(tensors, [row["text"] for row in rows], strict=True))
