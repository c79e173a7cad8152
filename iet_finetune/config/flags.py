"""Dataclass fields seen as command-line flags and as YAML keys, with errors that name the bad one."""

import argparse
import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError, one_line

Choices = tuple[str, ...] | typing.Callable[[], tuple[str, ...]]


def flag(
    default: Any, help: str, *, choices: Choices | None = None, resume: str | None = None, scope: str | None = None
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        help: its line in `--help`.
        choices: the values it may take, or a function that returns them.
        resume: "fixed" if a resumed run must have the same value, "free" if another one only changes the weights,
            "other" if it has no influence on the weights.
        scope: "public", "local" for what names something on this machine and is never published, or "secret".
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "resume": resume, "scope": scope}
    )


@dataclasses.dataclass(frozen=True)
class FlagSpec:
    """What one flag accepts: its name, the scalar type, whether it may be none, a list, or one of `choices`."""

    name: str
    scalar: type
    optional: bool
    many: bool
    default: Any
    help: str
    choices: tuple[str, ...] | None
    resume: str | None = None
    scope: str | None = None


def flag_specs(group: type) -> list[FlagSpec]:
    """The flags of one dataclass, in the order of its fields."""
    hints = typing.get_type_hints(group)
    return [_spec(field, hints[field.name]) for field in dataclasses.fields(group)]


def _spec(field: dataclasses.Field, hint: Any) -> FlagSpec:
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    optional = type(None) in parts
    inner = next(part for part in parts if part is not type(None))
    many = typing.get_origin(inner) is tuple
    scalar = typing.get_args(inner)[0] if many else inner
    facts = dict(field.metadata)
    choices = facts.pop("choices")
    return FlagSpec(
        field.name, scalar, optional, many, field.default, choices=choices() if callable(choices) else choices, **facts
    )


def convert(spec: FlagSpec, value: Any, where: str) -> Any:
    """`value` from YAML or the command line as the flag's type; `where` begins the error, such as "`--seed`".

    Raises:
        UserError: the value has another type, is not one of the choices, or is not finite.
    """
    if value is None or (spec.scalar is not str and isinstance(value, str) and value.lower() == "none"):
        if spec.optional:
            return None
        raise UserError(f"{where} needs a value of type {spec.scalar.__name__}, not none.")
    if spec.many:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert_scalar(spec, item, where) for item in items)
    return _convert_scalar(spec, value, where)


def _convert_scalar(spec: FlagSpec, value: Any, where: str) -> Any:
    wrong_type = UserError(f"{where} must be of type {spec.scalar.__name__}, not {value!r}.")
    if isinstance(value, bool) != (spec.scalar is bool) or isinstance(value, list | tuple | dict):
        raise wrong_type
    if spec.scalar is int and isinstance(value, float):
        raise wrong_type
    if spec.scalar is str and not isinstance(value, str):
        raise wrong_type
    try:
        # YAML 1.1 reads 1e-5 (no dot) as text, so text is converted too.
        converted = spec.scalar(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong_type from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise UserError(f"{where} must be a finite number, not {value!r}.")
    if spec.choices is not None and converted not in spec.choices:
        raise UserError(f"{where} must be one of {', '.join(spec.choices)}, not {value!r}.")
    return converted


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """ " Did you mean X?" for the known name closest to `name`, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean `{close[0]}`?" if close else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`--help` lists the flags).")


def build_parser(
    description: str,
    groups: dict[str, type],
    prog: str | None = None,
    only: typing.Container[str] | None = None,
    told: typing.Mapping[str, str] | None = None,
) -> argparse.ArgumentParser:
    """An argument parser with one titled group of flags per dataclass; absent flags leave no attribute.

    Args:
        prog: what `--help` calls the program; the script's name if not given.
        only: the names of the flags that it has; all if not given.
        told: the line of `--help`, default and all, of flags that mean something else here.
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
                _add_argument(section, spec, (told or {}).get(spec.name))
    return parser


def _add_argument(section: Any, spec: FlagSpec, told: str | None) -> None:
    help_text = (told or spec.help).replace("%", "%%")
    if spec.scalar is bool:
        names = (f"--{spec.name}", f"--no_{spec.name}")
        section.add_argument(*names, action=_BoolAction, nargs=0, dest=spec.name, help=help_text)
        return
    if told is None and spec.default is not None and spec.default != ():
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


def read_yaml(path: str, known: list[str]) -> dict[str, Any]:
    """The mapping in a YAML configuration file.

    Raises:
        UserError: no such file, not YAML, not a mapping, a key that stands twice, or an unknown key (its nearest
            neighbour is named).
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`--config {path}` cannot be read: {one_line(error)}.") from None
    except (yaml.YAMLError, ValueError) as error:
        # A date that does not exist, such as 2024-99-99, is a plain ValueError.
        raise UserError(f"`--config {path}` is not valid YAML: {' '.join(str(error).split())}.") from None
    if values is None or node is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"`--config {path}` must hold `key: value` lines, not a {type(values).__name__}.")
    for key in values:
        if key not in known:
            raise UserError(f"unknown key `{key}` in `--config {path}`.{nearest(str(key), known)}")
    keys = [key.value for key, _ in node.value]
    for key in values:
        # YAML itself would take the last one without a word.
        if keys.count(key) > 1:
            raise UserError(f"`{key}` stands twice in `--config {path}`: leave one.")
    return values
