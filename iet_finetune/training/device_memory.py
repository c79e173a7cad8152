"""When the device's memory does not suffice: one line that says what to change."""

import contextlib
from collections.abc import Iterator

import torch

from ..config.config import Config
from ..ensemble.checkpoint import CheckpointStore
from ..errors import UserError, one_line


@contextlib.contextmanager
def out_of_memory_explained(config: Config, store: CheckpointStore | None = None) -> Iterator[None]:
    """Turns torch's error inside into one line that names what to lower, and the checkpoint to go on from.

    Args:
        store: the run's checkpoints, once it has some.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # torch's first line goes on about its allocator.
        reason = ". ".join(one_line(error).split(". ")[:2]).rstrip(".")
        saved = store.all() if store is not None else []
        then = f", and go on from {saved[-1].name} with `--resume_from_checkpoint latest`" if saved else ""
        raise UserError(f"{reason}. {_what_helps(config)}{then}.") from None


def _what_helps(config: Config) -> str:
    """The flags that lower the need, those first that cost least."""
    training, ways = config.training, []
    if training.mixed_precision in (None, "no"):
        ways.append("use `--mixed_precision bf16`")
    if not training.gradient_checkpointing:
        ways.append("add `--gradient_checkpointing`")
    if training.train_batch_size > 1:
        ways.append(
            f"lower `--train_batch_size {training.train_batch_size}` and raise `--gradient_accumulation_steps` instead"
        )
    if not config.adapter.use_lora:
        if not config.optimizer.use_8bit_adam:
            ways.append("add `--use_8bit_adam`")
        ways.append("train a LoRA with `--use_lora`")
    ways.append(f"lower `--resolution {config.data.resolution}`")
    return f"What helps, the first things first: {', '.join(ways)}"
