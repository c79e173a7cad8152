"""Fine-tune diffusers pipelines with IET-AGC, so that they do not repeat their training images."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agc import AntiGradientControl as AntiGradientControl
    from .config import Config as Config
    from .errors import UserError as UserError
    from .merging import WeightedSum as WeightedSum
    from .merging import merge_state_dicts as merge_state_dicts
    from .objective import NoiseSchedule as NoiseSchedule
    from .objective import per_sample_loss as per_sample_loss
    from .pipelines import ClassConditionalPipeline as ClassConditionalPipeline
    from .sharding import shard_indices as shard_indices
    from .trainer import Trainer as Trainer

__version__ = "0.1.0"

# Each public name and the module it comes from. It is imported at first use, so that `--help` need not wait for torch.
_HOMES = {
    "AntiGradientControl": "agc",
    "ClassConditionalPipeline": "pipelines",
    "Config": "config",
    "NoiseSchedule": "objective",
    "Trainer": "trainer",
    "UserError": "errors",
    "WeightedSum": "merging",
    "merge_state_dicts": "merging",
    "per_sample_loss": "objective",
    "shard_indices": "sharding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
