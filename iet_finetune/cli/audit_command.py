"""The command `audit`: measures one pipeline, or sets the audits of several side by side."""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..audit.flags import OF_THE_RUN, PROGRAM, check_extra
from ..config.config import flag_groups
from ..config.flags import build_parser, flag_specs, parse_arguments
from ..errors import UserError, one_line

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


def audit_command(argv: list[str]) -> str:
    """What `iet-finetune audit` does with the arguments after that word; returns what it has to say at the end.

    Raises:
        UserError: whatever the user can mend.
    """
    given = parse_arguments(_parser(), argv, ["config", "model", "compare", *FLAGS])
    if "compare" in given:
        return _compare(given)
    check_extra()
    from accelerate import PartialState

    from ..audit.request import judge
    from ..publish.audited import audit_and_show

    return audit_and_show(judge(given), PartialState().device, shlex.join([*PROGRAM.split(), *argv]))


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(
        "Measure how much a pipeline repeats its training images, and how good its pictures are. What a folder that "
        "was trained here says of its data need not be said again.",
        {
            title: group
            for title, group in flag_groups().items()
            if {spec.name for spec in flag_specs(group)} & set(FLAGS)
        },
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


def _compare(given: Mapping[str, Any]) -> str:
    others = [name for name in given if name not in ("compare", "output_dir")]
    if others:
        raise UserError(f"`--{others[0]}` does nothing with `--compare`, which reads finished audits: leave it out.")
    from ..audit.report.compare import compare, write_comparison
    from ..audit.report.compare_text import as_text

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
