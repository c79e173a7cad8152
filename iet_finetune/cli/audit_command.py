"""The command `audit`: measures one pipeline, or compares the audits of several."""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..audit.flags import FLAGS, PROGRAM, check_audit, check_extra
from ..config.command_line import build_parser, parse_arguments
from ..config.config import flag_groups
from ..config.flags import convert, flag_specs
from ..config.places import expanded
from ..errors import UserError, one_line

# What `--quick` sets unless it is given: some five times fewer images to draw, in half the steps.
QUICK = {"num_images": "200", "num_inference_steps": "25", "membership_images": "200"}


def audit_command(argv: list[str]) -> str:
    """Runs `iet-finetune audit` with the arguments after that word; returns the text to print at the end.

    Raises:
        UserError: the input is wrong; says how to fix it.
    """
    given = parse_arguments(audit_parser(), argv, ["config", "model", "compare", "quick", *FLAGS])
    if "compare" in given:
        return _compare(given)
    if given.pop("quick", False):
        given = {name: value for name, value in QUICK.items() if _is_drawn(name, given)} | given
    check_extra()
    from ..audit.request import read_request

    check_audit((request := read_request(given)).config)
    from accelerate import PartialState

    from ..publish.audited import audit_and_show

    return audit_and_show(request, PartialState().device, shlex.join([*PROGRAM.split(), *argv]))


def _is_drawn(name: str, given: Mapping[str, Any]) -> bool:
    """Whether a number that `--quick` sets means anything: images that are there already are all measured."""
    return name == "membership_images" or "generated_dir" not in given


def audit_parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    parser = build_parser(
        "Measure how much a pipeline repeats its training images, and how good its images are. A model that was "
        "trained here needs no flags about its data.",
        {
            title: group
            for title, group in flag_groups().items()
            if {spec.name for spec in flag_specs(group)} & set(FLAGS)
        },
        PROGRAM,
        only=FLAGS,
        helps={name: spec.audit_help for name, spec in FLAGS.items() if spec.audit_help},
    )
    parser.usage = "%(prog)s --model MODEL [--quick] [--FLAG VALUE ...]"
    parser.add_argument(
        "--model",
        metavar="STR",
        help="Hub id, folder or .safetensors file of the pipeline, or a LoRA file, or its folder.",
    )
    numbers = ", ".join(f"--{name} {value}" for name, value in QUICK.items())
    parser.add_argument(
        "--quick", action="store_true", help=f"A first look in a tenth of the time: {numbers}, unless given."
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="Instead, compare several audit.json; with `--output_dir` also as a page.",
    )
    return parser


def _compare(given: Mapping[str, Any]) -> str:
    others = [name for name in given if name not in ("compare", "output_dir")]
    if others:
        raise UserError(f"`--{others[0]}` does nothing with `--compare`, which reads finished audits: leave it out.")
    from ..audit.report.compare import compare, write_comparison
    from ..audit.report.compare_text import as_text

    comparison = compare([Path(expanded(name, "`--compare`")) for name in given["compare"]])
    text = as_text(comparison)
    if "output_dir" in given:
        folder = Path(convert(FLAGS["output_dir"], given["output_dir"], "`--output_dir`"))
        try:
            page = write_comparison(folder, comparison)
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise UserError(f"`--output_dir {folder}` cannot be written: {reason}. Choose another folder.") from None
        text += f"\n\npage: {page}"
    return text
