"""Does what a run does with its images until the first step, and writes how long: measured_start.py REPORT FLAGS..."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from iet_finetune.planning.peaks import peak_resident

LATENT = (4, 2, 2)
# Parts of `load_images` that have a column of their own.
PARTS = {"_read_source": "rows", "_hashed": "hashes", "draw_held_out": "draws", "draw_subset": "draws"}


class Clock:
    """Seconds of the processor by stage; what is measured within a stage is not counted again in it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to the stage."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began, before = time.process_time(), sum(self.seconds.values())
            self.seconds.setdefault(stage, 0.0)
            try:
                return function(*args, **kwargs)
            finally:
                within = sum(self.seconds.values()) - before
                self.seconds[stage] += time.process_time() - began - within

        return timed


def images_ready(clock: Clock, config: Any) -> str:
    """Everything up to the first batch; returns what tells this data from other data."""
    data = import_module("iet_finetune.training.data")
    loader, groups = import_module("iet_finetune.data.loader"), import_module("iet_finetune.distributed.groups")
    with ExitStack() as patched:
        dataset = import_module("iet_finetune.data.dataset")
        for name, stage in PARTS.items():
            patched.enter_context(patch.object(dataset, name, clock(stage, getattr(dataset, name))))
        found = clock("other", data.find_images)(config, True)
    indices = clock("shards", data.split)(config, found.images)
    schedule = clock("shards", data.schedule_of)(config, found.images, indices)
    fingerprint = clock("fingerprint", lambda: found.images.fingerprint)()
    ranks, device = groups.Ranks.alone(), import_module("torch").device("cpu")

    def first_batch() -> None:
        buckets = import_module("iet_finetune.data.buckets").Buckets.square(config.data.resolution)
        family = SimpleNamespace(latent_shape_of=lambda size: LATENT)
        shards, _ = data.read_shards(config, family, found, indices, buckets, ranks, device)
        visits = loader.Visits(schedule.steps(0, 0, 1), config.training.train_batch_size)
        next(iter(loader.micro_batches(shards[0], visits, num_workers=0, pin_memory=False)))

    clock("first batch", first_batch)()
    return f"{fingerprint} {len(found.heldout)} {found.heldout.fingerprint}"


def main(report: Path, flags: list[str]) -> None:
    """Go through the stages, then write their seconds and the peak in bytes."""
    clock, began = Clock(), time.perf_counter()
    clock("torch", import_module)("torch")
    clock("imports", import_module)("iet_finetune.training.data")
    config = clock("imports", import_module("iet_finetune").Config.from_command_line)(flags)
    identity = images_ready(clock, config)
    facts = {
        "stages": {**clock.seconds, "all": sum(clock.seconds.values())},
        "waited": time.perf_counter() - began,
        "resident": peak_resident(),
        "identity": identity,
    }
    report.write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
