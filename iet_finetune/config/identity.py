"""What makes a run the same run: the settings that a resumed run must share with its checkpoint."""

import dataclasses
from typing import Any

from ..errors import UserError
from .config import Config, all_flags
from .settings import DEFAULT_MERGE_EPOCHS

# Part of a run's identity already, or without influence on the weights.
_NOT_FREE = (
    *("train_data_dir", "dataset_name", "dataset_config_name", "dataset_split", "image_column", "caption_column"),
    *("class_column",),
    *("max_train_samples", "holdout_fraction", "resolution", "output_dir", "seed"),
    *("cache_latents", "channels_last", "dataloader_num_workers"),
    *("train_batch_size", "gradient_accumulation_steps", "use_ema", "use_8bit_adam", "ddp_timeout"),
)
_OF_AN_ADAPTER = ("use_lora", "rank", "lora_alpha", "lora_layers", "use_rslora", "lora_merge")
_FREE_IN_ENSEMBLE = ("optimizer_across_rounds", "outer_lr", "outer_momentum")
# Each machine may keep its files in places of its own; what is in them is compared by itself.
_OF_A_MACHINE = (
    *(
        "pretrained_model_name_or_path",
        "model_config",
        "cache_dir",
        "train_data_dir",
        "dataset_name",
        "dataloader_num_workers",
    ),
    *("output_dir", "offload_dir", "holdout_data_dir", "generated_dir"),
)


def run_identity(config: Config, data_fingerprint: str, base_model: str) -> dict[str, Any]:
    """Name -> value of everything that decides which weights come out; a name is a flag where one says it all.

    Args:
        data_fingerprint: of the training images and captions.
        base_model: fingerprint of the pipeline before training.
    """
    training, ensemble = config.training, config.ensemble
    every_epochs = None if ensemble.merge_every_steps else ensemble.merge_every_epochs or DEFAULT_MERGE_EPOCHS
    return {
        "the training data": data_fingerprint,
        "`--num_shards`": ensemble.num_shards,
        "`--seed`": training.seed,
        "`--shard_by_column`": ensemble.shard_by_column,
        "`--train_batch_size` times `--gradient_accumulation_steps`": (
            training.train_batch_size * training.gradient_accumulation_steps
        ),
        "`--merge_every_epochs`": every_epochs,
        "`--merge_every_steps`": ensemble.merge_every_steps,
        "`--merge_weighting`": ensemble.merge_weighting,
        "`--agc_threshold`": config.agc.agc_threshold,
        "`--agc_decay`": config.agc.agc_decay,
        "`--agc_bins`": config.agc.agc_bins,
        "`--resolution`": config.data.resolution,
        "`--prediction_type`": config.model.prediction_type,
        "`--channels_last`": training.channels_last,
        **{f"`--{name}`": getattr(config.adapter, name) for name in _OF_AN_ADAPTER},
        "`--use_ema`": config.optimizer.use_ema,
        "`--use_8bit_adam`": config.optimizer.use_8bit_adam,
        **{f"`--{name}`": config.to_flags()[name] for name, spec in all_flags().items() if spec.resume == "fixed"},
        "the base model": base_model,
    }


def common_flags(config: Config) -> dict[str, Any]:
    """Flag -> value of all that the ranks of a run must have in common; machines may have a `--config` file each."""
    return {f"`--{name}`": value for name, value in config.to_flags().items() if name not in _OF_A_MACHINE}


def check_identity(saved: dict[str, Any], current: dict[str, Any], checkpoint: str) -> None:
    """Raises a `UserError` that names the first thing that changed since the checkpoint."""
    defaults = {f"`--{name}`": spec.default for name, spec in all_flags().items()}
    for name, value in current.items():
        # A checkpoint of a version without the flag was made as its default says.
        before = saved.get(name, defaults.get(name))
        if before != value:
            shown = "" if name.startswith("the ") else f" ({before} then, {value} now)"
            raise UserError(
                f"cannot resume from {checkpoint}: {name} has changed{shown}. Put it back, or start anew in another "
                "`--output_dir`."
            )


def free_settings(config: Config, mixed_precision: str) -> dict[str, Any]:
    """The settings of training that a resumed run may change, at the price of other weights than without a stop.

    Args:
        mixed_precision: what Accelerate made of the flag and its own configuration.
    """
    groups = (config.data, config.training, config.optimizer)
    settings = {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
    settings |= {name: getattr(config.ensemble, name) for name in _FREE_IN_ENSEMBLE}
    settings |= {"lora_dropout": config.adapter.lora_dropout, "mixed_precision": mixed_precision}
    specs = all_flags()
    settings |= {name: value for name, value in config.to_flags().items() if specs[name].resume == "free"}
    return {n: v for n, v in settings.items() if n not in _NOT_FREE and specs[n].resume in ("free", None)}
