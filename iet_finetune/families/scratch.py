"""Builds a pipeline with random weights from a network's configuration, for training from scratch."""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ..config.flags import nearest
from ..config.settings import PRESETS
from ..errors import UserError, one_line
from ..method.seeding import weights_seed
from .finding import PipelineSource
from .quiet import quiet_loading

FOLDER = Path(__file__).parent / "models"
Settings = dict[str, Any]


def scratch_source(name: str) -> PipelineSource:
    """Returns the source of a pipeline whose weights are not initialized yet.

    Raises:
        UserError: as `read_recipe`.
    """
    read_recipe(name)
    classes = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    return PipelineSource(None, "DDPMPipeline", classes, {"unet": torch.float32})


def read_recipe(name: str) -> tuple[Settings, Settings]:
    """Returns the settings of the `UNet2DModel` and of the `DDPMScheduler` for `--model_config`.

    Args:
        name: one of `settings.PRESETS`, or a JSON or YAML file: a config.json as diffusers writes it, or any part of
            one; under `scheduler`, the scheduler's settings if they differ from the defaults.

    Raises:
        UserError: no such file or preset, not a mapping, another model, or an unknown key.
    """
    source = f"`--model_config {name}`"
    network = dict(_read(FOLDER / f"{name}.yaml" if name in PRESETS else Path(name), source))
    scheduler = network.pop("scheduler", None) or {}
    if not isinstance(scheduler, dict):
        raise UserError(f"{source} must hold `key: value` lines under `scheduler`, not {scheduler!r:.40}.")
    return _checked(network, UNet2DModel, source), _checked(scheduler, DDPMScheduler, f"`scheduler` in {source}")


def _read(path: Path, source: str) -> Settings:
    if not path.is_file():
        raise UserError(f"{source} is no file, and the networks known by name are {', '.join(PRESETS)}.")
    try:
        text = path.read_text(encoding="utf-8")
        # Not YAML for both: it reads JSON's 1e-05 as text.
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{source} cannot be read: {one_line(error).rstrip('.')}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{source} must hold the configuration of a UNet2DModel, not a {type(content).__name__}.")
    return content


def _checked(settings: Settings, kind: type, source: str) -> Settings:
    """Returns the settings without diffusers' private keys, which begin with _; the class must know each."""
    stated = settings.get("_class_name", kind.__name__)
    if stated != kind.__name__:
        raise UserError(f"{source} is for a {stated}; only a {kind.__name__} can be trained from scratch.")
    known = inspect.signature(kind.__init__).parameters  # type: ignore[misc]  # of a class, not an instance
    chosen = {str(key): value for key, value in settings.items() if not str(key).startswith("_")}
    for key in chosen:
        if key not in known:
            raise UserError(f"unknown key `{key}` in {source}: a {kind.__name__} has none.{nearest(key, known)}")
    return {key: _number(value, known[key].default) for key, value in chosen.items()}


def _number(value: Any, default: Any) -> Any:
    # YAML 1.1 reads 1e-6 (no dot) as text.
    if isinstance(value, str) and isinstance(default, float):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def build_pipeline(name: str, resolution: int, seed: int) -> DDPMPipeline:
    """Builds a pipeline whose weights depend on the seed alone; leaves torch's global generator unchanged.

    Args:
        name: as `read_recipe`.
        resolution: side of its images in pixels, if the configuration has no `sample_size`.
        seed: `--seed`.

    Raises:
        UserError: as `read_recipe`, or no network can be built from the settings.
    """
    network, scheduler = read_recipe(name)
    if network.get("sample_size") is None:
        network["sample_size"] = resolution
    try:
        with torch.random.fork_rng(devices=[]), quiet_loading():
            torch.manual_seed(weights_seed(seed))
            return DDPMPipeline(UNet2DModel(**network), DDPMScheduler(**scheduler))
    except Exception as error:  # diffusers and torch raise all kinds of errors for inconsistent settings
        raise UserError(f"`--model_config {name}` makes no network: {one_line(error).rstrip('.')}.") from None


def small_recipe(name: str) -> tuple[Settings, int]:
    """Returns a network of the same blocks with few channels, as `--model_config` takes it, and a fitting resolution.

    Raises:
        UserError: as `read_recipe`.
    """
    network, scheduler = read_recipe(name)
    defaults = inspect.signature(UNet2DModel.__init__).parameters
    levels = len(network.get("block_out_channels") or defaults["block_out_channels"].default)
    resolution = 2 ** max(levels, 4)
    small = {"block_out_channels": [8] * levels, "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    return {**network, **small, "sample_size": resolution, "scheduler": scheduler}, resolution
