"""Does `--compile` compile once for all clones?"""

import time
from collections.abc import Sequence
from typing import Any

import torch

from .. import shapes
from ..checks import Machine, expect
from ..trials import Memory, StepClock, UnsavedTrainer, fresh_accelerator, pictures, settings


def compiled(machine: Machine, found: dict[str, Any]) -> None:
    """SD 1.5 in bf16, two clones, two rounds: graphs after each clone of each round."""
    from torch._dynamo.utils import counters

    machine.need_card()
    memory, size, batch = Memory(), 512, 4
    config = settings(
        machine.scratch, resolution=size, train_batch_size=batch, num_shards=2, merge_every_steps=6,
        max_train_steps=12, use_ema=True, mixed_precision="bf16", compile=True, learning_rate=1e-5,
    )  # fmt: skip
    clock = StepClock(machine.device)
    graphs: list[int] = []
    with fresh_accelerator():
        began = time.perf_counter()
        trainer = UnsavedTrainer(config, [clock], pipeline=shapes.sd15("cuda"), dataset=pictures(2 * batch, size))
        torch.cuda.synchronize()
        found["start, s"] = time.perf_counter() - began
        collect = trainer.ensemble.collect

        def count(wave: Sequence[int]) -> None:
            graphs.append(counters["stats"]["unique_graphs"])
            collect(wave)

        trainer.ensemble.collect = count  # type: ignore[method-assign]
        trainer.train_rounds()
    found["graphs after each clone"] = graphs
    found["images/s"] = clock.images_per_second()
    found["training, GB"] = memory.peak()
    expect(graphs[0] > 0, "nothing was compiled")
    expect(graphs[-1] == graphs[0], "another clone, or round, was compiled anew")
