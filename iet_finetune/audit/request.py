"""What is to be audited: from the flags, and from the `training_config.yaml` in the model's own folder."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..config.config import Config, flag_names
from ..config.places import expanded
from ..config.recipes import read_yaml
from ..config.settings import ModelConfig
from ..errors import UserError, one_line
from ..files import LEDGER, LORA_NAME
from .flags import OF_THE_RUN

CONFIG_NAME = "training_config.yaml"
# What decides how much a model may remember; advice depends on it.
OF_TRAINING = ("num_train_epochs", "stop_when", "dedup", "skip_rule", "agc_threshold", "use_lora", "rank")
# How a pipeline of the Hub is chosen; in a finished run these belong to its base.
OF_LOADING = ("base_config", "revision", "variant")


@dataclass(frozen=True)
class AuditRequest:
    """What is audited, and against what.

    Attributes:
        config: with `audit`, `data`, and how pipelines are loaded.
        model: Hub id or folder of the pipeline, or of a LoRA file; None audits generated images alone.
        reference: how the pipeline is loaded that calibrates membership inference; None goes without.
        reference_is_asked: whether the user asked for that reference; an assumed one may be missing.
        split_is_known: whether the model is known to have been trained without the fraction that is held out.
        has_resolution: whether `--resolution` was given; otherwise it is that of the pipeline's images.
        output: the folder of the audit and of the images that are drawn.
        own: whether that folder belongs to this model alone.
        trained_with: those of the flags `OF_TRAINING` that the run had; empty if the model was not trained here.
    """

    config: Config
    model: str | None
    reference: ModelConfig | None
    reference_is_asked: bool
    split_is_known: bool
    has_resolution: bool
    output: Path
    own: bool
    trained_with: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ledger(self) -> Path | None:
        """The ledger of the run, if the model was trained here."""
        return None if self.model is None else Path(self.model) / LEDGER


def read_request(given: Mapping[str, Any]) -> AuditRequest:
    """Reads the flags, the file of `--config`, and the configuration of the run that trained the model.

    Args:
        given: raw values by flag, with `model`, and `config` if there is one.

    Raises:
        UserError: a wrong value, or no place for the audit.
    """
    model = expanded(given["model"], "`--model`") if "model" in given else None
    of_run = _of_the_run(model)
    flags = {name: value for name, value in given.items() if name != "model"}
    config = Config.layered(flags, {name: of_run[name] for name in OF_THE_RUN if name in of_run})
    if config.audit.generated_dir is not None:
        refuse_drawing(given)
    own = model is not None and os.path.isdir(model)
    if not own and "output_dir" not in given:
        raise _no_output(model)
    output = Path(config.training.output_dir if "output_dir" in given else f"{model}/audit")
    asked = config.audit.reference_model
    # The base of a run that was trained here is what its model was before.
    assumed = config.model.pretrained_model_name_or_path if of_run else None
    loading = of_run if asked is None else {name: getattr(config.model, name) for name in ("cache_dir", "base_config")}
    if (Path(str(model)) / LORA_NAME).is_file():
        config = replace(config, model=_loaded_as(config.model, of_run, given))
    return AuditRequest(
        config=replace(config, model=replace(config.model, model_config=None)),
        model=model,
        reference=_model(loading, asked or assumed),
        reference_is_asked=asked is not None,
        split_is_known=_is_split_of(config, of_run),
        has_resolution="resolution" in given or "resolution" in of_run or _in_file(given, "resolution"),
        output=output,
        trained_with={name: of_run[name] for name in OF_TRAINING if _is_plain(of_run.get(name))},
        own=own and output.resolve() == Path(f"{model}/audit").resolve(),
    )


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it as it is."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _no_output(model: str | None) -> UserError:
    """What is wrong where no folder is given and the model has none, perhaps since its name is mistyped."""
    if model is None or os.path.exists(model):
        return UserError("`--output_dir` is missing: say where the audit is to be written.")
    return UserError(
        f"`--model {model}` is no folder here. If it is a pipeline of the Hub, give `--output_dir` too, where the "
        "audit is to be written."
    )


def refuse_drawing(given: Mapping[str, Any]) -> None:
    """Raises a `UserError` for a flag that says what to draw, where images are given."""
    for name in ("num_images", "prompts"):
        if name in given:
            raise UserError(
                f"`--{name} {given[name]}` does nothing with `--generated_dir`, all of whose images are audited: "
                "leave it out."
            )


def _model(of_run: Mapping[str, Any], name: str | None) -> ModelConfig | None:
    """How a reference model is loaded: as the run itself loaded it, where that is known."""
    if name is None:
        return None
    known = {key: of_run.get(key) for key in (*OF_LOADING, "cache_dir", "prediction_type")}
    return ModelConfig(pretrained_model_name_or_path=name, **known)


def _loaded_as(model: ModelConfig, of_run: Mapping[str, Any], given: Mapping[str, Any]) -> ModelConfig:
    """The base of a LoRA file that was trained here, loaded as the run loaded it unless something else is given."""
    if "pretrained_model_name_or_path" in given:
        return model
    known = {name: of_run[name] for name in OF_LOADING if name in of_run and getattr(model, name) is None}
    return replace(model, **known)


def _is_split_of(config: Config, of_run: Mapping[str, Any]) -> bool:
    """Whether the run held out the same fraction."""
    flags = config.to_flags()
    return bool(of_run) and all(flags[name] == of_run.get(name) for name in ("holdout_fraction", "seed"))


def _of_the_run(model: str | None) -> dict[str, Any]:
    """The flags in the `training_config.yaml` beside a model that was trained here; nothing of another one."""
    file = Path(str(model)) / CONFIG_NAME
    if model is None or not file.is_file():
        return {}
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"`{file}` cannot be read: {one_line(error)}. Mend or remove it.") from None
    if not isinstance(values, dict):
        raise UserError(f"`{file}` must hold `key: value` lines, not a {type(values).__name__}. Mend or remove it.")
    return values


def _in_file(given: Mapping[str, Any], name: str) -> bool:
    return "config" in given and name in read_yaml(given["config"], flag_names())
