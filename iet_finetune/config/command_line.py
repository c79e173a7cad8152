"""The command line: flags as arguments of a parser, and the raw values that were typed."""

import argparse
import sys
import typing
from typing import Any, NoReturn

from ..errors import UserError, show
from .flags import FlagSpec, flag_specs
from .unknown import unknown

# What a switch takes after an equals sign.
_SWITCHED = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class _Parser(argparse.ArgumentParser):
    """Its errors are a `UserError` each, and switches may have a value: `--use_ema=true` is `--use_ema`."""

    def __init__(self, switches: typing.Container[str], **settings: Any) -> None:
        super().__init__(**settings)
        self._switches = switches

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `--help`).")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, after the values of switches have been read."""
        return super().parse_known_args([self._without_value(word) for word in args], namespace)

    def _without_value(self, word: str) -> str:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals or name not in self._switches:
            return word
        if value.lower() not in _SWITCHED:
            raise UserError(f"`--{name}` is a switch: it takes true or false (or yes, no, 1, 0), not {value!r}.")
        return f"--{name}" if _SWITCHED[value.lower()] else f"--no_{name}"


def build_parser(
    description: str,
    groups: dict[str, type],
    prog: str | None = None,
    only: typing.Container[str] | None = None,
    helps: typing.Mapping[str, str] | None = None,
    add_help: bool = True,
    takes_config: bool = True,
) -> argparse.ArgumentParser:
    """An argument parser with one titled group of flags per dataclass; absent flags leave no attribute.

    Args:
        prog: what `--help` calls the program; the script's name if not given.
        only: the names of the flags that it has; all if not given.
        helps: the line of `--help`, default and all, of flags for which it is another one here.
        add_help: whether it has argparse's `--help`.
        takes_config: whether it has `--config`.
    """
    specs = [spec for group in groups.values() for spec in flag_specs(group)]
    parser = _Parser(
        switches={spec.name for spec in specs if spec.scalar is bool},
        prog=prog,
        description=description,
        add_help=add_help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=119),
    )
    if takes_config:
        said = "YAML file whose keys are the flags below; flags override it."
        parser.add_argument("--config", metavar="FILE", help=said)
    for title, group in groups.items():
        section = parser.add_argument_group(title)
        for spec in flag_specs(group):
            if only is None or spec.name in only:
                _add_argument(section, spec, (helps or {}).get(spec.name))
    return parser


def training_parser(
    description: str,
    groups: dict[str, type],
    prog: str | None = None,
    *,
    brief: typing.Mapping[str, str] | None = None,
    helps: typing.Mapping[str, str] | None = None,
    usage: str = "[--config FILE] [--FLAG VALUE ...]",
    add: typing.Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.ArgumentParser:
    """The parser of a run: as `build_parser` makes it, but with help in levels.

    `--help` shows the flags that matter most, `--help-all` all of them, and `--help-from` those of others.

    Args:
        brief: the former and their lines; those that declare a `brief` line if not given.
        helps: as in `build_parser`.
        usage: what follows the program's name.
        add: adds arguments of its own to a parser, in the place of `--config`.
    """
    specs = [spec for group in groups.values() for spec in flag_specs(group)]
    if brief is None:
        brief = {spec.name: with_default(spec, _brief(spec)) for spec in specs if spec.brief}
    every = build_parser(description, groups, prog, helps=helps, add_help=False, takes_config=add is None)
    main = build_parser(description, groups, prog, only=brief, helps=brief, add_help=False, takes_config=add is None)
    ranks = "`--num_processes N` starts N ranks on this machine, one per GPU."
    main.epilog = f"These are {len(brief)} of {len(specs)} flags; `--help-all` shows the others too. {ranks}"
    every.epilog = ranks
    for parser in (main, every):
        parser.usage = f"%(prog)s {usage}"
        if add is not None:
            add(parser)
        _add_helps(parser, main, every)
    return every


def _add_helps(parser: argparse.ArgumentParser, main: argparse.ArgumentParser, every: argparse.ArgumentParser) -> None:
    """Options that print the help of one of the two, or a table."""
    add = parser.add_argument
    to_main: dict[str, Any] = {"action": _Show, "text": lambda _: main.format_help(), "nargs": 0}
    to_all = to_main | {"text": lambda _: every.format_help()}
    add("-h", "--help", help="Show the flags that matter most.", **to_main)
    add("--help-all", help="Show all flags.", **to_all)
    add("--help_all", help=argparse.SUPPRESS, **to_all)
    said = "Show what the flags of diffusers, kohya or simpletuner are here."
    add("--help-from", action=_Show, text=_table_of, metavar="TRAINER", help=said)


def _brief(spec: FlagSpec) -> str:
    return spec.help if spec.brief is True else spec.brief or ""


class _Show(argparse.Action):
    """Prints what `text` makes of the option's value, and ends the program."""

    def __init__(self, text: typing.Callable[[Any], str], **settings: Any) -> None:
        super().__init__(**settings)
        self._text = text

    def __call__(self, parser, namespace, values, option_string=None):
        show(self._text(values).rstrip())
        sys.exit(0)


def _table_of(trainer: str) -> str:
    # Imported where it is needed: most runs are not asked for it.
    from .foreign import TRAINERS
    from .foreign.page import table

    if trainer not in TRAINERS:
        raise UserError(f"`--help-from` must be one of {', '.join(TRAINERS)}, not {trainer!r}.")
    return table(trainer)


def _add_argument(section: Any, spec: FlagSpec, own_help: str | None) -> None:
    help_text = (own_help or with_default(spec, spec.help)).replace("%", "%%")
    if spec.scalar is bool:
        _add_switch(section, spec, help_text)
        return
    metavar = "{" + ",".join(spec.choices) + "}" if spec.choices else spec.scalar.__name__.upper()
    section.add_argument(f"--{spec.name}", nargs="+" if spec.many else None, metavar=metavar, help=help_text)


def _add_switch(section: Any, spec: FlagSpec, help_text: str) -> None:
    """`--NAME` and `--no_NAME`; the latter is shown only where it changes something."""
    settings = {"action": _BoolAction, "nargs": 0, "dest": spec.name}
    both = (f"--{spec.name}", f"--no_{spec.name}")
    section.add_argument(*both[: 2 if spec.default else 1], help=help_text, **settings)
    if not spec.default:
        section.add_argument(both[1], help=argparse.SUPPRESS, **settings)


def with_default(spec: FlagSpec, text: str) -> str:
    """A flag's line of help, with the default if it has one."""
    if spec.default is None or spec.default == ():
        return text
    shown = {True: "on", False: "off"}[spec.default] if spec.scalar is bool else spec.default
    return f"{text} (default: {' '.join(map(str, shown)) if spec.many else shown})"


class _BoolAction(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not str(option_string).startswith("--no_"))


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str], known: list[str], others_too: bool = False
) -> dict[str, Any]:
    """The raw values given on the command line, by flag name; `config` among them if given.

    Args:
        known: the flags, of which the nearest is offered for an unknown one.
        others_too: whether what other trainers' flags are called in a run is told too.

    Raises:
        UserError: unknown flags, all of them, or a flag without its value.
    """
    arguments, rest = parser.parse_known_args(argv)
    strange = list(dict.fromkeys(word.split("=")[0].removeprefix("--") for word in rest if word.startswith("--")))
    if strange:
        raise unknown(strange, known, others_too=others_too)
    if rest:
        where = ", that of a switch after an equals sign" if rest[0].lower() in _SWITCHED else ""
        raise UserError(f"unexpected argument {rest[0]!r}: every value follows a flag{where} (see `--help`).")
    return vars(arguments)
