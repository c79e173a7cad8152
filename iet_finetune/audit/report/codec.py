"""Dataclasses to types of JSON and back, by their annotations."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
_WORDS = {str: "text", int: "whole number", float: "finite number", bool: "truth value"}


def encode(value: Any) -> Any:
    """A value in types of JSON. A field marked `inline` puts its items among those of its owner."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, dict):
        return {key: encode(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [encode(each) for each in value]
    if not is_dataclass(value):
        return value
    items: dict[str, Any] = {}
    for each in fields(value):
        part = encode(getattr(value, each.name))
        items |= part if each.metadata.get("inline") else {each.name: part}
    return items


def decode(kind: type[T], values: Any, renamed: Mapping[str, str], place: str = "it") -> T:
    """A dataclass from types of JSON. What is missing or null has its default; other keys are ignored.

    Args:
        renamed: keys of dataclasses in an older file, as they are called now.
        place: what an error calls the value.

    Raises:
        ValueError: a value is missing, or of another type than the annotation says; names its place.
    """
    if not isinstance(values, dict):
        raise ValueError(f"`{place}` is no table")
    items = {renamed.get(name, name): value for name, value in values.items()}
    hints, arguments = get_type_hints(kind), {}
    own = fields(kind)  # type: ignore[arg-type]  # a dataclass, which a type variable cannot say
    names = {each.name for each in own}
    for each in own:
        inline = each.metadata.get("inline")
        value = {name: item for name, item in items.items() if name not in names} if inline else items.get(each.name)
        has_default = each.default is not MISSING or each.default_factory is not MISSING
        if value is not None or not has_default:
            inside = each.name if place == "it" else f"{place}.{each.name}"
            arguments[each.name] = _decoded(hints[each.name], value, renamed, place if inline else inside)
    return kind(**arguments)


def _decoded(hint: Any, value: Any, renamed: Mapping[str, str], place: str) -> Any:
    origin, inside = get_origin(hint), get_args(hint)
    if origin is UnionType:
        wanted = next(each for each in inside if each is not NoneType)
        return None if value is None else _decoded(wanted, value, renamed, place)
    if is_dataclass(hint):
        return decode(hint, value, renamed, place)  # type: ignore[arg-type]  # a class, not an instance
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"`{place}` is no table")
        # Null stands for what is not there.
        present = {key: each for key, each in value.items() if each is not None or inside[1] is Any}
        return {key: _decoded(inside[1], each, renamed, f"{place}.{key}") for key, each in present.items()}
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise ValueError(f"`{place}` is no list")
        return origin(_decoded(inside[0], each, renamed, place) for each in value)
    if hint is not Any and not _fits(hint, value):
        raise ValueError(f"`{place}` is no {_WORDS[hint]}")
    return value


def _fits(hint: type, value: Any) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
