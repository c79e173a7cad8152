"""The command `audit`: measures one pipeline, or sets the audits of several side by side."""

import argparse
import importlib.util
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .config import GROUPS, Config, flag_names
from .errors import UserError, one_line
from .files import LORA_NAME
from .flags import build_parser, flag_specs, parse_arguments, read_yaml
from .settings import AuditConfig, DataConfig, ModelConfig

if TYPE_CHECKING:
    import torch

    from .audit.measure import Judged

PROGRAM = "iet-finetune audit"
CONFIG_NAME = "training_config.yaml"
OF_DATA = tuple(spec.name for spec in flag_specs(DataConfig))
OF_AUDIT = tuple(spec.name for spec in flag_specs(AuditConfig) if spec.name != "audit")
# What a run that was trained here is asked about itself.
OF_THE_RUN = (
    *("pretrained_model_name_or_path", "cache_dir", "prediction_type"),
    *OF_DATA,
    *OF_AUDIT,
    *("seed", "max_sequence_length", "guidance_scale"),
)
FLAGS = (*OF_THE_RUN, "revision", "variant", "mixed_precision", "output_dir")
# What means something else here than in training.
TOLD = {
    "pretrained_model_name_or_path": "Hub id or folder of the pipeline that a LoRA file is for.",
    "resolution": "Side of the square images in pixels; that of training, else of the pipeline's own, if not given.",
    "dataset_split": "Split of the data set that was trained on. (default: train)",
    "max_train_samples": "The training was on a random subset of this many images.",
    "random_flip": "Makes no difference here: mirrored copies are always looked for.",
    "caption_dropout": "Makes no difference here.",
    "cache_latents": "Makes no difference here.",
    "dataloader_num_workers": "Makes no difference here.",
    "output_dir": "Where the audit and its pictures are written; `audit` in the folder of the model if not given.",
    "seed": "Seed of the pictures and of every other draw; that of training if not given.",
    "mixed_precision": "Precision in which the pipeline works here; fp32 if not given.",
}
# How a pipeline of the Hub is chosen; of a finished run it is its base's and not its own.
OF_LOADING = ("revision", "variant")
EXTRA = ("scipy", "torchmetrics")


def audit_command(argv: list[str]) -> str:
    """What `iet-finetune audit` does with the arguments after that word; returns what it has to say at the end.

    Raises:
        UserError: whatever the user can mend.
    """
    given = parse_arguments(_parser(), argv, ["config", "model", "compare", *FLAGS])
    if "compare" in given:
        return _compare(given)
    _check_extra()
    judged = judge(given)
    from accelerate import PartialState

    return _run(judged, PartialState().device, shlex.join([*PROGRAM.split(), *argv]))


def audit_model(folder: Path, device: "torch.device") -> str:
    """Audits a model that was trained here as the flags of its run say; returns what there is to say at the end.

    Raises:
        UserError: whatever the user can mend.
    """
    return _run(judge({"model": str(folder)}), device, shlex.join([*PROGRAM.split(), "--model", str(folder)]))


def check_audit(config: Config) -> None:
    """Raises a `UserError` for what would make an audit fail at the end of a long run and can be seen at its start."""
    _check_extra()
    audit = config.audit
    for name in ("holdout_data_dir", "generated_dir"):
        folder = getattr(audit, name)
        if folder is not None and not os.path.isdir(folder):
            raise UserError(f"`--{name} {folder}` is not a folder. Give the folder that holds the images.")
    if audit.prompts not in ("train", "heldout", "none"):
        from .audit.samples import read_prompts

        read_prompts(audit.prompts)


def _check_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"an audit needs {' and '.join(missing)}: `pip install 'iet_finetune[audit]'`.")


def _run(judged: "Judged", device: "torch.device", command: str) -> str:
    from .audit.run import run_audit
    from .audit.summary import as_text

    audit = run_audit(judged, device, command)
    if judged.own and (judged.output.parent / CONFIG_NAME).is_file():
        from .card import show_audit

        show_audit(judged.output.parent)
    return as_text(audit, judged.output)


def judge(given: Mapping[str, Any]) -> "Judged":
    """What is to be audited, from the flags, the file of `--config`, and what the model's own folder tells of its run.

    Args:
        given: raw values by flag, with `model`, and `config` if there is one.

    Raises:
        UserError: a wrong value, or no place for the audit.
    """
    from .audit.measure import Judged

    model = given.get("model")
    of_run = _of_the_run(model)
    flags = {name: value for name, value in given.items() if name != "model"}
    config = Config.layered(flags, {name: of_run[name] for name in OF_THE_RUN if name in of_run})
    if config.audit.generated_dir is not None:
        _refuse_of_drawing(given)
    own = model is not None and os.path.isdir(model)
    if not own and "output_dir" not in given:
        raise UserError("`--output_dir` is missing: say where the audit is to be written.")
    output = Path(config.training.output_dir if "output_dir" in given else f"{model}/audit")
    asked = config.audit.reference_model
    # The base of a run that was trained here is what its model was before.
    assumed = config.model.pretrained_model_name_or_path if of_run else None
    loading = of_run if asked is None else {"cache_dir": config.model.cache_dir}
    if (Path(str(model)) / LORA_NAME).is_file():
        config = replace(config, model=_loaded_as(config.model, of_run, given))
    return Judged(
        config=replace(config, model=replace(config.model, model_config=None)),
        model=model,
        reference=_model(loading, asked or assumed),
        reference_is_wish=asked is not None,
        split_is_known=_is_split_of(config, of_run),
        has_resolution="resolution" in given or "resolution" in of_run or _in_file(given, "resolution"),
        output=output,
        own=own and output.resolve() == Path(f"{model}/audit").resolve(),
    )


def _refuse_of_drawing(given: Mapping[str, Any]) -> None:
    for name in ("num_images", "prompts"):
        if name in given:
            raise UserError(
                f"`--{name} {given[name]}` does nothing with `--generated_dir`, all of whose pictures are judged: "
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
    """Whether the run, if there was one, drew the same share and so was trained without it."""
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


def _parser() -> argparse.ArgumentParser:
    groups = dict(GROUPS.values())
    parser = build_parser(
        "Measure how much a pipeline repeats its training images, and how good its pictures are. What a folder that "
        "was trained here says of its data need not be said again.",
        {title: group for title, group in groups.items() if {spec.name for spec in flag_specs(group)} & set(FLAGS)},
        PROGRAM,
        only=FLAGS,
        told=TOLD,
    )
    parser.add_argument("--model", metavar="STR", help="Hub id or folder of the pipeline, or folder of a LoRA file.")
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="Instead, set several audit.json side by side; with `--output_dir` also as a page.",
    )
    return parser


def _in_file(given: Mapping[str, Any], name: str) -> bool:
    return "config" in given and name in read_yaml(given["config"], flag_names())


def _compare(given: Mapping[str, Any]) -> str:
    others = [name for name in given if name not in ("compare", "output_dir")]
    if others:
        raise UserError(f"`--{others[0]}` does nothing with `--compare`, which reads finished audits: leave it out.")
    from .audit.compare import as_text, compare, write_comparison

    comparison = compare([Path(name) for name in given["compare"]])
    text = as_text(comparison)
    if "output_dir" in given:
        folder = Path(given["output_dir"])
        try:
            page = write_comparison(folder, comparison)
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise UserError(f"`--output_dir {folder}` cannot be written: {reason}. Choose another folder.") from None
        text += f"\n\npage: {page}"
    return text
