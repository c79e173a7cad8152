"""What makes a run the same run: the settings that a resumed run must share with its checkpoint."""

from collections.abc import Callable
from typing import Any

from ..errors import UserError
from .config import Config, all_flags
from .flags import FlagSpec
from .settings import DEFAULT_MERGE_EPOCHS


def run_identity(config: Config, data_fingerprint: str, base_model: str) -> dict[str, Any]:
    """Name -> value of everything that decides which weights come out; a name is a flag where one says it all.

    Args:
        data_fingerprint: of the training images and captions.
        base_model: fingerprint of the pipeline before training.
    """
    ensemble, flags = config.ensemble, _flags(config, lambda spec: spec.resume == "fixed")
    # Only their product decides.
    batch = flags.pop("train_batch_size") * flags.pop("gradient_accumulation_steps")
    if ensemble.merge_every_steps is None:
        flags["merge_every_epochs"] = ensemble.merge_every_epochs or DEFAULT_MERGE_EPOCHS
    return {
        "the training data": data_fingerprint,
        **{f"`--{name}`": value for name, value in flags.items()},
        "`--train_batch_size` times `--gradient_accumulation_steps`": batch,
        "the base model": base_model,
    }


def common_flags(config: Config) -> dict[str, Any]:
    """Flag -> value of all that the ranks of a run must have in common; machines may have a `--config` file each."""
    return {f"`--{name}`": value for name, value in _flags(config, lambda spec: not spec.is_per_machine).items()}


def check_identity(saved: dict[str, Any], current: dict[str, Any], checkpoint: str) -> None:
    """Raises a `UserError` that names the first thing that changed since the checkpoint."""
    defaults = {f"`--{name}`": spec.default for name, spec in all_flags().items()}
    for name, value in current.items():
        # A checkpoint of a version without the flag was made as its default says.
        before = saved.get(name, defaults.get(name))
        if before != value:
            shown = "" if name.startswith("the ") else f" ({before} then, {value} now)"
            raise UserError(
                f"cannot resume from {checkpoint}: {name} has changed{shown}. Put it back, or start over in another "
                "`--output_dir`."
            )


def check_flags(saved: dict[str, Any], config: Config, checkpoint: str) -> None:
    """As `check_identity`, of the flags alone: before data or a model is loaded, and anything is made of them."""
    current = run_identity(config, "", "")
    check_identity(saved, {name: value for name, value in current.items() if not name.startswith("the ")}, checkpoint)


def free_settings(config: Config, mixed_precision: str) -> dict[str, Any]:
    """The settings that a resumed run may change, at the price of other weights than an uninterrupted run's.

    Args:
        mixed_precision: the precision that Accelerate chose from the flag and its own configuration.
    """
    return _flags(config, lambda spec: spec.resume == "free") | {"mixed_precision": mixed_precision}


def _flags(config: Config, wanted: Callable[[FlagSpec], bool]) -> dict[str, Any]:
    specs = all_flags()
    return {name: value for name, value in config.to_flags().items() if wanted(specs[name])}
