"""Checks of single values, each with an error that names the flag."""

from ...errors import UserError


def require(condition: bool, message: str) -> None:
    """Raises a `UserError` with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def at_least_one(name: str, value: int | None) -> None:
    """Raises a `UserError` unless the value is none or 1 or more."""
    require(value is None or value >= 1, f"`--{name}` must be at least 1, not {value}.")


def not_negative(name: str, value: float) -> None:
    """Raises a `UserError` unless the value is 0 or more."""
    require(value >= 0, f"`--{name}` must be 0 or more, not {value}.")


def probability(name: str, value: float) -> None:
    """Raises a `UserError` unless the value is in [0, 1]."""
    require(0 <= value <= 1, f"`--{name}` must be in [0, 1], not {value}.")
