"""When the device's memory does not suffice: one line that says what to change."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from ..config.config import Config
from ..ensemble.checkpoint import CheckpointStore
from ..errors import UserError, out_of_memory
from ..families.encoding import ENCODE_CHUNK


@contextlib.contextmanager
def out_of_memory_explained(config: Config, store: CheckpointStore | None, phase: Callable[[], str]) -> Iterator[None]:
    """Turns torch's error into one line that names what to lower, what costs least first.

    Args:
        store: the run's checkpoints. If there is one, what a run may change that goes on from it comes first. None
            before training.
        phase: tells where the run is; see `Callback.on_phase`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        saved = store.all() if store is not None else []
        ways, anew = _WAYS.get(phase(), _for_training)(config)
        if saved and ways:
            advice = f"go on from {saved[-1].name} with `--resume_from_checkpoint latest` and {_listed(ways)}"
            advice += f"; or start over in another `--output_dir` and {_listed(anew)}" if anew else ""
        else:
            advice = _listed([*ways, *anew])
        raise UserError(f"{out_of_memory(error)}: {advice}.") from None


def _for_encoding(config: Config) -> tuple[list[str], list[str]]:
    """What lowers the need of encoders: what a resumed run may do too, and what makes another run of it."""
    fixed, size = [], config.training.train_batch_size
    if size > 1:
        fixed.append(f"lower `--train_batch_size {size}`, as so many (at most {ENCODE_CHUNK}) are encoded at once")
    if _may_quantise(config) and config.adapter.quantize_encoders is None:
        fixed.append("add `--quantize_encoders nf4`")
    return [], [*fixed, _lower_resolution(config)]


def _for_drawing(config: Config) -> tuple[list[str], list[str]]:
    """The same of validation images."""
    count = config.validation.num_validation_images
    free = [f"lower `--num_validation_images {count}`"] if count > 1 else []
    if config.validation.validation_prompts:
        free.append("leave out `--validation_prompts`")
    return free, [_lower_resolution(config)]


def _for_training(config: Config) -> tuple[list[str], list[str]]:
    """The same of training and all that is not named here."""
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
    elif _may_quantise(config) and config.adapter.quantize_base is None:
        fixed.append("add `--quantize_base nf4`")
    return free, [*fixed, _lower_resolution(config)]


# By phase.
_WAYS = {"encoding": _for_encoding, "drawing": _for_drawing}


def _may_quantise(config: Config) -> bool:
    # What is quantised must be read again.
    return config.adapter.use_lora and config.model.pretrained_model_name_or_path is not None


def _lower_resolution(config: Config) -> str:
    return f"lower `--resolution {config.data.resolution}`"


def _listed(ways: list[str]) -> str:
    return ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])} or {ways[-1]}"
