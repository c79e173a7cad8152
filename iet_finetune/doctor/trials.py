"""What checks are made of: a few made-up images, runs of a few steps, and clocks that do not make a GPU wait."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from ..config.config import Config
from ..training.callbacks import Callback, StepFacts
from ..training.trainer import Trainer

GB = 1e9


def pictures(count: int, size: int) -> Dataset:
    """So many coloured pictures with captions, of coarse noise, so that their files are small."""
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        for _ in range(count)
    ]
    captions = [f"picture {number} of coloured noise" for number in range(count)]
    features = Features({"image": ImageFeature(), "text": Value("string")})
    return Dataset.from_dict({"image": images, "text": captions}, features=features)


def settings(folder: Path, **flags: Any) -> Config:
    """A run that writes into a folder and is told of nowhere."""
    return Config.from_flags(
        **{
            "output_dir": str(folder / "run"),
            "cache_dir": str(folder / "cache"),
            "report_to": "none",
            "mixed_precision": "no",
            "logging_steps": 10**6,
            "checkpointing_steps": 10**6,
            "checkpoints_total_limit": 1,
            "num_validation_images": 1,
            "validation_inference_steps": 1,
            **flags,
        }
    )


@contextlib.contextmanager
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps the device and the precision of a process's first run; inside comes another first run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def where_it_fits(found: dict[str, Any], words: str) -> Iterator[None]:
    """Inside is something for comparison, which a smaller card need not hold; where it does not, that is noted."""
    try:
        yield
    except torch.OutOfMemoryError:
        found[words] = "does not fit"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class UnsavedTrainer(Trainer):
    """The trainer without checkpoints, whose writing is not what is measured."""

    def save_checkpoint(self, step: int, *, keep_older: bool = False) -> Path:
        """Nothing."""
        return self.output


class StepClock(Callback):
    """When steps have ended on the device, without waiting for it."""

    def __init__(self, device: str) -> None:
        self._card = device == "cuda"
        self._ends: list[Any] = []
        self._images = 0

    def on_step_end(self, facts: StepFacts) -> None:
        """Notes the time, and how many images there were: a small shard may not fill a batch."""
        self._images = facts.images
        self.note()

    def images_per_second(self) -> float:
        """Of a trainer's steps, which have as many images each."""
        return self._images / self.seconds()

    def note(self) -> None:
        """Notes that a step has ended."""
        if self._card:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ends.append(event)
        else:
            self._ends.append(time.perf_counter())

    def seconds(self) -> float:
        """The middle of all times from one step's end to the next's."""
        if self._card:
            torch.cuda.synchronize()
            times = [a.elapsed_time(b) / 1000 for a, b in zip(self._ends, self._ends[1:], strict=False)]
        else:
            times = [b - a for a, b in zip(self._ends, self._ends[1:], strict=False)]
        return float(np.median(times))


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The function, which adds its seconds to a list; the device has done what it was given before and after."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        wait()
        began = time.perf_counter()
        result = function(*args, **kwargs)
        wait()
        spent.append(time.perf_counter() - began)
        return result

    return wrapper


def wait() -> None:
    """Returns when the device has done everything."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Memory:
    """The most memory on the device since it was last asked, in GB; None without a card."""

    def __init__(self) -> None:
        self.peak()

    def peak(self) -> float | None:
        """The peak, from which it counts anew."""
        gc.collect()
        if not torch.cuda.is_available():
            return None
        peak = torch.cuda.max_memory_allocated() / GB
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return peak


def host_peak() -> float:
    """The most memory of the host that this process has had at a time, in GB, as Linux counts it; NaN elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) * 1024 / GB for line in lines if line.startswith("VmHWM"))
