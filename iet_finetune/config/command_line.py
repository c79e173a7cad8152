"""The command line: flags as arguments of a parser, and the raw values that were typed."""

import argparse
import typing
from typing import Any, NoReturn

from ..errors import UserError
from .flags import FlagSpec, flag_specs, nearest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`--help` lists the flags).")


def build_parser(
    description: str,
    groups: dict[str, type],
    prog: str | None = None,
    only: typing.Container[str] | None = None,
    helps: typing.Mapping[str, str] | None = None,
) -> argparse.ArgumentParser:
    """An argument parser with one titled group of flags per dataclass; absent flags leave no attribute.

    Args:
        prog: what `--help` calls the program; the script's name if not given.
        only: the names of the flags that it has; all if not given.
        helps: the line of `--help`, default and all, of flags that mean something else here.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=119),
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file whose keys are the flags below; flags override it."
    )
    for title, group in groups.items():
        section = parser.add_argument_group(title)
        for spec in flag_specs(group):
            if only is None or spec.name in only:
                _add_argument(section, spec, (helps or {}).get(spec.name))
    return parser


def _add_argument(section: Any, spec: FlagSpec, own_help: str | None) -> None:
    help_text = (own_help or spec.help).replace("%", "%%")
    if spec.scalar is bool:
        names = (f"--{spec.name}", f"--no_{spec.name}")
        section.add_argument(*names, action=_BoolAction, nargs=0, dest=spec.name, help=help_text)
        return
    if own_help is None and spec.default is not None and spec.default != ():
        shown = " ".join(map(str, spec.default)) if spec.many else spec.default
        help_text += f" (default: {shown})"
    metavar = "{" + ",".join(spec.choices) + "}" if spec.choices else spec.scalar.__name__.upper()
    section.add_argument(f"--{spec.name}", nargs="+" if spec.many else None, metavar=metavar, help=help_text)


class _BoolAction(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not str(option_string).startswith("--no_"))


def parse_arguments(parser: argparse.ArgumentParser, argv: list[str], known: list[str]) -> dict[str, Any]:
    """The raw values given on the command line, by flag name; `config` among them if given.

    Raises:
        UserError: an unknown flag (its nearest neighbour is named) or a flag without its value.
    """
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("--"):
            raise UserError(f"unexpected argument {name!r}: every value follows a flag (`--help` lists them).")
        raise UserError(f"unknown flag `{name}`.{nearest(name.removeprefix('--'), known).replace('`', '`--', 1)}")
    return vars(arguments)
