"""Fine-tune diffusers pipelines with IET-AGC, so that they do not repeat their training images."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config.config import Config as Config
    from .config.registry import register_merge_rule as register_merge_rule
    from .config.registry import register_sharding as register_sharding
    from .config.registry import register_skip_rule as register_skip_rule
    from .errors import UserError as UserError
    from .families.pipelines import ClassConditionalPipeline as ClassConditionalPipeline
    from .method.agc import AntiGradientControl as AntiGradientControl
    from .method.merging import WeightedSum as WeightedSum
    from .method.merging import merge_state_dicts as merge_state_dicts
    from .method.objective import NoiseSchedule as NoiseSchedule
    from .method.objective import per_sample_loss as per_sample_loss
    from .method.sharding import shard_indices as shard_indices
    from .training.callbacks import Callback as Callback
    from .training.trainer import Trainer as Trainer

__version__ = "0.1.0"

# Each public name and the module it comes from. It is imported at first use, so that `--help` need not wait for torch.
_HOMES = {
    "AntiGradientControl": "method.agc",
    "Callback": "training.callbacks",
    "ClassConditionalPipeline": "families.pipelines",
    "Config": "config.config",
    "NoiseSchedule": "method.objective",
    "Trainer": "training.trainer",
    "UserError": "errors",
    "WeightedSum": "method.merging",
    "merge_state_dicts": "method.merging",
    "per_sample_loss": "method.objective",
    "register_merge_rule": "config.registry",
    "register_sharding": "config.registry",
    "register_skip_rule": "config.registry",
    "shard_indices": "method.sharding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
