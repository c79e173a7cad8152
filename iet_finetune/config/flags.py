"""Dataclass fields seen as flags and as YAML keys: what each declares, and values turned into its type."""

import dataclasses
import difflib
import functools
import math
import os
import types
import typing
from typing import Any

from ..errors import UserError
from .places import expanded

RESUME = ("fixed", "free", "other")
SCOPES = ("public", "local", "named", "secret")
AUDIT = ("given", "run", "recorded", "noted")
NEEDS = ("captions", "prompts", "noise schedule", "flow matching", "T5", "guidance embedding")
KEPT: Any = object()  # what `--smoke` leaves as it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a flag means to the rest of the package, declared at its field and nowhere else.

    Attributes:
        resume: "fixed" if a resumed run must have the same value, "free" if another value changes the weights only,
            "other" if it has no influence on the weights.
        scope: "public"; "local" for what names a place of this machine and is never published; "named" for a name
            that others know or a place of this machine, published only as the former; or "secret", never written
            anywhere. In what is local or named a leading `~` stands for a home folder. May be left out where the value
            is a number, a switch or one of `choices`: then it is public.
        known: the values of a "named" flag that others know.
        per_machine: whether each machine of a run may have a value of its own; of what is local or named if left out.
        names: of "pipeline", "dataset" and "heldout_images" those that, as an object, the flag does not go with.
        instead_of: a flag that this one replaces; only one of the two may be given.
        needs: the feature of a pipeline family without which the flag means nothing and is refused; one of `NEEDS`.
        smoke: the value that `--smoke` sets.
        audit: whether `iet-finetune audit` takes the flag: "given" if only the command line sets it there, "run" if it
            is taken over from the run's own configuration, "recorded" if it is also a condition of the metrics that
            `audit.json` keeps, "noted" if it is kept there but changes no metric.
        brief: its line in `--help`, which shows only the flags that matter most, one line of a terminal each; True for
            the line of `--help-all`.
        audit_help: its line in that command's `--help`, default and all, where it means something else.
    """

    resume: str
    scope: str = "public"
    known: tuple[str, ...] = ()
    per_machine: bool | None = None
    names: tuple[str, ...] = ()
    instead_of: str | None = None
    needs: str | None = None
    smoke: Any = KEPT
    brief: str | bool = False
    audit: str | None = None
    audit_help: str | None = None


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | typing.Callable[[], tuple[str, ...]] | None = None,
    **facts: Any,
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        help: its line in `--help-all`.
        choices: the values it may take, or a function that returns them.
        facts: as in `Facts`; `resume` is always needed, and `scope` for a text without choices.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "facts": facts})


# `flag` by what another value means for a resumed run.
fixed, free, other = (functools.partial(flag, resume=resume) for resume in RESUME)


@dataclasses.dataclass(frozen=True)
class FlagSpec(Facts):
    """One flag: its name, the scalar type, whether it may be none, a list, or one of `choices`, and its facts."""

    name: str
    scalar: type
    optional: bool
    many: bool
    default: Any
    help: str
    choices: tuple[str, ...] | None

    @property
    def is_place(self) -> bool:
        """Whether a value may be a file or folder of this machine."""
        return self.scope in ("local", "named")

    @property
    def is_per_machine(self) -> bool:
        """Whether each machine of a run may have a value of its own."""
        return self.is_place if self.per_machine is None else self.per_machine


def flag_specs(group: type) -> list[FlagSpec]:
    """The flags of one dataclass, in the order of its fields.

    Raises:
        TypeError: a field lacks a fact that a flag must declare, or declares one that does not exist.
    """
    # What may be chosen can change, as rules are registered; all else is read once.
    declared = zip(_declared(group), dataclasses.fields(group), strict=True)
    return [_with_choices(spec, field.metadata["choices"]) for spec, field in declared]


@functools.cache
def _declared(group: type) -> list[FlagSpec]:
    """The flags of one dataclass with the choices that stand in it, none where a function returns them."""
    hints = typing.get_type_hints(group)
    return [_spec(f"{group.__name__}.{each.name}", each, hints[each.name]) for each in dataclasses.fields(group)]


def _with_choices(spec: FlagSpec, choices: Any) -> FlagSpec:
    return dataclasses.replace(spec, choices=choices()) if callable(choices) else spec


def _spec(owner: str, field: dataclasses.Field, hint: Any) -> FlagSpec:
    if "facts" not in field.metadata:
        raise TypeError(f"`{owner}` is no flag: declare it with `flag(default, help, resume=...)`.")
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    optional = type(None) in parts
    inner = next(part for part in parts if part is not type(None))
    many = typing.get_origin(inner) is tuple
    scalar = typing.get_args(inner)[0] if many else inner
    choices, facts = field.metadata["choices"], field.metadata["facts"]
    _check_facts(owner, facts, scope_needed=scalar is str and choices is None)
    choices = None if callable(choices) else choices
    return FlagSpec(field.name, scalar, optional, many, field.default, field.metadata["help"], choices, **facts)


def _check_facts(owner: str, facts: dict[str, Any], scope_needed: bool) -> None:
    closed = {"resume": RESUME, "scope": SCOPES, "audit": AUDIT, "needs": NEEDS}
    needed = {"resume"} | ({"scope"} if scope_needed else set())
    for name, values in closed.items():
        if (name in needed or facts.get(name) is not None) and facts.get(name) not in values:
            raise TypeError(f"the flag `{owner}` must declare {name}= as one of {', '.join(values)}.")
    for name in facts.keys() - {each.name for each in dataclasses.fields(Facts)}:
        raise TypeError(f"the flag `{owner}` declares {name}=, which is no fact of a flag.")


def convert(spec: FlagSpec, value: Any, where: str) -> Any:
    """`value` from YAML or the command line as the flag's type; `where` begins the error, such as "`--seed`".

    A place is expanded here, for all that read it: see `places.expanded`.

    Raises:
        UserError: the value has another type, is not one of the choices, is not finite, or can be no place.
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
    if spec.is_place and isinstance(value, os.PathLike):
        value = os.fspath(value)
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
    return expanded(converted, where) if spec.is_place else converted


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """ " Did you mean X?" for the known name closest to `name`, or nothing when none is close."""
    close = closest(name, known)
    return f" Did you mean `{close}`?" if close else ""


def closest(name: str, known: typing.Iterable[str]) -> str | None:
    """The known name closest to `name`; None when none is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)
