"""The command `fit`: fine-tunes on somebody's own images with settings that it chooses, and audits the result."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..audit.flags import check_extra
from ..config.command_line import parse_arguments, training_parser, with_default
from ..config.config import Config, all_flags, flag_groups, flag_names
from ..config.fitting import CHOSEN, Choice, Circumstances, choose
from ..config.folders import check_folders
from ..errors import UserError, show
from ..training.interrupts import says_how_to_go_on
from .parsing import PROGRAM
from .ranks import split_off, start_ranks

if TYPE_CHECKING:
    import numpy as np

    from ..data.survey import Survey

# Flags of `train` under shorter names.
SHORT = {"base": "pretrained_model_name_or_path", "output": "output_dir"}
# What `--help` shows besides; `--help-all` shows all flags.
MAIN = {
    "train_data_dir": "Folder of images; or give it as the first argument.",
    "default_caption": "Caption of images without one of their own.",
    "holdout_data_dir": "Folder of similar images to compare with, instead of holding some out.",
    "resolution": "Side of the square training images in pixels.",
    "use_lora": "Train a LoRA adapter; `--no_use_lora`: the whole denoiser.",
    "num_train_epochs": "Passes over the images, at most.",
    "train_batch_size": "Images in a micro-batch.",
    "learning_rate": "Learning rate after warm-up.",
    "validation_prompts": "Prompts drawn before training and after rounds.",
    "num_images": "Images that the audit draws.",
    "resume_from_checkpoint": '"latest": go on from the last checkpoint, if there is one.',
    "dry_run": "Choose, say how much memory, disk and time the run takes, and end.",
}
# Sides of what a pipeline draws where its denoiser does not say.
USUAL_SIDE, SIDE_OF_OLDER = 1024, 512
PROMPTS = 4
# Flags that override another one where they are given.
OVERRIDDEN = {"num_train_epochs": ("max_train_steps", "total_train_steps")}


def fit_command(argv: list[str]) -> None:
    """Runs `iet-finetune fit` with the arguments after that word.

    Raises:
        UserError: whatever the user can mend.
    """
    ranks, argv = split_off(argv)
    given = _read(argv)
    first = Config.layered(given)
    _check(first)
    check_folders(first)
    with contextlib.nullcontext() if first.training.dry_run else says_how_to_go_on(first):
        _choose_and_train(first, given, ranks)


def _choose_and_train(first: Config, given: dict[str, Any], ranks: int | None) -> None:
    """Trains with what was given and what is chosen besides, or says what that would take.

    Args:
        first: what was given, alone.
        ranks: how many to start; None for this process alone.
    """
    from ..training.starting import first_device

    found = _look(first, given, first_device())
    made = [each for each in choose(found) if not _is_given(each.flag, given)]
    config = Config.layered(given, {each.flag: each.value for each in made})
    check_folders(config)
    show("\n".join(["settings chosen for these images:", *map(_line, made)]))
    if config.training.dry_run:
        from .plan_command import show_plan

        show_plan(config)
        return
    if ranks is not None and ranks > 1:
        _train_with_ranks(ranks, config, given)
    else:
        from ..training.trainer import Trainer

        Trainer(config).train()
    file = config.output_path / "training_config.yaml"
    show(f"to train again, also with other settings: {PROGRAM} train --config {file} --output_dir ANOTHER")


def _train_with_ranks(count: int, config: Config, given: dict[str, Any]) -> None:
    """Trains with the chosen settings on so many ranks; exits with their code if they fail."""
    # The choice is made once: ranks that chose for themselves would have to agree.
    secrets = [
        f"--{name}={given[name]}" for name, spec in all_flags().items() if spec.scope == "secret" and name in given
    ]
    with tempfile.TemporaryDirectory(prefix="iet-fit-") as folder:
        file = Path(folder) / "chosen.yaml"
        file.write_text(yaml.safe_dump(config.to_flags(), sort_keys=False), encoding="utf-8")
        code = start_ranks(count, ["iet_finetune", "train", "--config", str(file), *secrets])
    if code:
        sys.exit(code)


def _read(argv: list[str]) -> dict[str, Any]:
    """The given flags by their names in a run."""
    if argv and not argv[0].startswith("-"):
        argv = ["--train_data_dir", *argv]
    given = parse_arguments(fit_parser(), argv, [*flag_names(), *SHORT], others_too=True)
    if "config" in given:
        raise UserError(f"`--config` goes with `{PROGRAM} train`: `fit` chooses by itself, and flags override it.")
    return given


def fit_parser() -> argparse.ArgumentParser:
    """The parser of its arguments."""
    chosen = {name: f"{spec.help} (default: chosen)" for name, spec in all_flags().items() if name in CHOSEN}
    return training_parser(
        "Fine-tune on your own images with settings chosen for them, and measure what the result remembers. Every "
        "flag of a run may be given, and then overrides what would be chosen.",
        flag_groups(),
        f"{PROGRAM} fit",
        brief={name: _brief(name, line) for name, line in MAIN.items()},
        helps=chosen,
        usage="FOLDER --base HUB_ID [--output DIR] [--FLAG VALUE ...]",
        add=_add_short,
    )


def _brief(name: str, line: str) -> str:
    return f"{line} (default: chosen)" if name in CHOSEN else with_default(all_flags()[name], line)


def _add_short(parser: argparse.ArgumentParser) -> None:
    """The short names, and `--config`, which is refused in words of its own."""
    helps = {
        "base": "Hub id, folder or .safetensors file of the pipeline to fine-tune.",
        "output": "Where the result is written.",
    }
    for name, flag in SHORT.items():
        said = with_default(all_flags()[flag], helps[name])
        parser.add_argument(f"--{name}", dest=flag, metavar="STR", help=said)
    parser.add_argument("--config", help=argparse.SUPPRESS)


def _check(config: Config) -> None:
    if config.data.train_data_dir is None and config.data.dataset_name is None:
        raise UserError(f"no images: name their folder, as in `{PROGRAM} fit my_photos --base HUB_ID`.")
    if config.model.pretrained_model_name_or_path is None:
        raise UserError("`--base` is missing: give the Hub id or folder of the pipeline to fine-tune.")


def _is_given(flag: str, given: dict[str, Any]) -> bool:
    """Whether a flag, or one that replaces it, was given, or does nothing beside what was given."""
    if flag == "features" and given.get("audit") is False:
        return True
    instead = [name for name, spec in all_flags().items() if spec.instead_of == flag]
    return any(name in given for name in (flag, all_flags()[flag].instead_of, *instead, *OVERRIDDEN.get(flag, ())))


def _look(config: Config, given: dict[str, Any], device: Any) -> Circumstances:
    """What there is: images, base model and device."""
    import diffusers

    from ..data.survey import survey
    from ..families import Family, family_class, find_pipeline

    source = find_pipeline(config.model)
    kind = family_class(source, config.model)
    show("looking at the images ...")
    images = survey(config.data, seed=config.training.seed, cache_dir=config.model.cache_dir)
    if kind.needs_captions and not images.has_captions:
        raise UserError(
            "these images have no captions, which this base model needs: give all of them one with "
            '`--default_caption "a photo of sks dog"`, or see docs/data.md.'
        )
    sizes, can_audit = images.images.sizes, _can_audit()
    return Circumstances(
        images=len(images.images) - images.copies,
        side=int(sorted(sizes.min(axis=1).tolist())[len(sizes) // 2]) if sizes is not None else USUAL_SIDE,
        own_side=own_side(source.folder, kind.denoiser_name, source.class_name),
        adapters=given.get("use_lora", hasattr(getattr(diffusers, source.class_name, None), "load_lora_weights")),
        prompts=_prompts(images) if kind.needs_captions else (),
        cut=_cut(sizes) if sizes is not None and kind.side_multiple is not Family.side_multiple else 0.0,
        device_memory=device.memory,
        has_bf16=device.has_bf16,
        can_audit=can_audit,
        features=_features(config) if can_audit and "features" not in given else config.audit.features,
    )


def _cut(sizes: "np.ndarray") -> float:
    """The share of images with these sizes (N, 2) that squares would cut off, on average."""
    from ..data.buckets import Buckets, shares_outside, targets

    return float(shares_outside(sizes, targets(sizes, Buckets.square(1))).mean())


def own_side(folder: Path | None, denoiser: str, class_name: str) -> int:
    """Pixels of a side of the images that a pipeline draws, as its files say."""
    usual = SIDE_OF_OLDER if class_name == "StableDiffusionPipeline" else USUAL_SIDE
    if folder is None:
        return usual
    side = _read_json(folder / denoiser / "config.json").get("sample_size")
    levels = _read_json(folder / "vae" / "config.json").get("block_out_channels")
    return side * 2 ** (len(levels) - 1 if levels else 0) if isinstance(side, int) else usual


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _prompts(found: "Survey") -> tuple[str, ...]:
    """Different captions, from all over the set."""
    texts = list(dict.fromkeys(captions[0] for captions in found.images.captions if captions[0].strip()))
    return tuple(texts[:: max(1, len(texts) // PROMPTS)][:PROMPTS])


def _features(config: Config) -> tuple[str, ...]:
    """What the audit compares images by; the Hub is asked only if the base model comes from it."""
    from ..audit.measures.preferred import preferred_features

    return preferred_features(online=not os.path.exists(str(config.model.pretrained_model_name_or_path)))


def _can_audit() -> bool:
    try:
        check_extra()
    except UserError:
        return False
    return True


def _line(choice: Choice) -> str:
    value = choice.value
    shown = " ".join(f'"{each}"' for each in value) if isinstance(value, list) else str(value).lower()
    return f"  --{choice.flag} {shown}: {choice.reason}"
