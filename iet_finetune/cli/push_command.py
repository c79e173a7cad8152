"""The command `push`: uploads a finished run."""

import argparse
from pathlib import Path
from typing import Any

from ..config.command_line import parse_arguments
from ..config.flags import convert, flag_specs
from ..config.places import expanded
from ..config.settings import HubConfig
from ..errors import UserError
from ..publish.hub import push
from .parsing import CommandParser


def push_command(argv: list[str]) -> str:
    """Runs `iet-finetune push OUTPUT [flags]` with the arguments after the word `push`; returns the URL.

    Raises:
        UserError: wrong arguments, or what `push` raises.
    """
    specs = {spec.name: spec for spec in flag_specs(HubConfig) if spec.name != "push_to_hub"}
    parser = CommandParser(
        "push",
        description="Upload a finished run to the Hub.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("output_dir", metavar="OUTPUT", help="The `--output_dir` of a finished run.")
    for name, spec in specs.items():
        options: dict[str, Any] = {"action": "store_true"} if spec.scalar is bool else {"metavar": "TEXT"}
        parser.add_argument(f"--{name}", help=spec.help, **options)
    given = parse_arguments(parser, argv, list(specs))
    output_dir = Path(expanded(given.pop("output_dir"), "OUTPUT"))
    if not output_dir.is_dir():
        raise UserError(f"OUTPUT `{output_dir}` is not a folder: give the `--output_dir` of a finished run.")
    return push(output_dir, HubConfig(**{name: convert(specs[name], v, f"`--{name}`") for name, v in given.items()}))
