"""When the device's memory does not suffice for training: one line that says what to change."""

import contextlib
from collections.abc import Iterator

import torch

from ..config.config import Config
from ..ensemble.checkpoint import CheckpointStore
from ..errors import UserError, out_of_memory


@contextlib.contextmanager
def out_of_memory_explained(config: Config, store: CheckpointStore) -> Iterator[None]:
    """Turns torch's error within a training step into one line that names what to lower, what costs least first.

    Args:
        store: the run's checkpoints. If there is one, what a run may change that goes on from it comes first.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        saved = store.all()
        ways, anew = _ways(config)
        if saved and ways:
            advice = f"go on from {saved[-1].name} with `--resume_from_checkpoint latest` and {_listed(ways)}"
            advice += f"; or start over in another `--output_dir` and {_listed(anew)}" if anew else ""
        else:
            advice = _listed([*ways, *anew])
        raise UserError(f"{out_of_memory(error)}: {advice}.") from None


def _ways(config: Config) -> tuple[list[str], list[str]]:
    """What lowers the need: what a resumed run may do too, and what makes another run of it."""
    training, free, fixed = config.training, [], []
    if not training.gradient_checkpointing:
        free.append("add `--gradient_checkpointing`")
    if training.train_batch_size > 1:
        size, parts = training.train_batch_size, training.gradient_accumulation_steps
        free.append(f"halve `--train_batch_size {size}` and double `--gradient_accumulation_steps {parts}`")
    if training.mixed_precision in (None, "no"):
        free.append("use `--mixed_precision bf16`, or `fp16` on older cards")
    if not config.adapter.use_lora:
        if not config.optimizer.use_8bit_adam:
            fixed.append("add `--use_8bit_adam`")
        fixed.append("train a LoRA with `--use_lora`")
    fixed.append(f"lower `--resolution {config.data.resolution}`")
    return free, fixed


def _listed(ways: list[str]) -> str:
    return ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])} or {ways[-1]}"
