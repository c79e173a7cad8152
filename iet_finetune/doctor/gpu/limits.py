"""What happens when memory ends, and with fewer bits."""

import importlib.util
from typing import Any

import torch

from ...errors import UserError
from ...families.tiny import RESOLUTION, tiny_sd
from ..checks import Machine, NotHere, expect
from ..trials import StepClock, UnsavedTrainer, fresh_accelerator, pictures, settings


def out_of_memory(machine: Machine, found: dict[str, Any]) -> None:
    """A batch that the card cannot hold ends in an error of the user, which names what to lower."""
    machine.need_card()
    torch.cuda.set_per_process_memory_fraction(0.02)
    config = settings(
        machine.scratch, resolution=256, train_batch_size=256, num_shards=1, merge_every_steps=2, max_train_steps=2
    )
    with fresh_accelerator():
        try:
            UnsavedTrainer(config, pipeline=tiny_sd(), dataset=pictures(256, 256)).train()
        except UserError as error:
            found["says"] = str(error)
        except torch.OutOfMemoryError as error:
            found["torch says"] = str(error).splitlines()[0]
    expect("says" in found, "no line of ours")
    expect("train_batch_size" in found["says"], "the line does not name what to lower")


def eight_bits(machine: Machine, found: dict[str, Any]) -> None:
    """Two clones with Adam in 8 bits, whose state comes and goes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotHere("bitsandbytes is not installed")
    machine.need_card()
    config = settings(
        machine.scratch, resolution=RESOLUTION, train_batch_size=2, num_shards=2, merge_every_steps=4,
        max_train_steps=8, use_8bit_adam=True,
    )  # fmt: skip
    clock = StepClock(machine.device)
    with fresh_accelerator():
        UnsavedTrainer(config, [clock], pipeline=tiny_sd(), dataset=pictures(8, RESOLUTION)).train_rounds()
    found["step, s"] = clock.seconds()
