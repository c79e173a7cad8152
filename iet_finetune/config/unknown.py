"""The error for names that are no flags here: all of them in one line, each with what was probably meant."""

from collections.abc import Iterable

from ..errors import UserError
from .flags import closest


def unknown(
    names: Iterable[str], known: Iterable[str], kind: str = "flag", where: str = "", *, others_too: bool = True
) -> UserError:
    """A `UserError` that says of every name what a flag of another trainer is here, or which known name is near.

    Args:
        names: without dashes, one at least.
        known: the names that there are.
        kind: "flag" or "key".
        where: what follows the names, such as " in `FILE`".
        others_too: whether these are flags of a run, for which those of other trainers may have been taken.
    """
    dashes, known = "--" if kind == "flag" else "", list(known)
    meant = {f"`{dashes}{name}`": _meant(name, known, dashes, others_too) for name in names}
    if len(meant) > 1:
        listed = "; ".join(f"{name} ({what})" if what else name for name, what in meant.items())
        return UserError(f"unknown {kind}s{where}: {listed}.")
    ((name, what),) = meant.items()
    sentence = f" {what[0].upper()}{what[1:]}" if what else ""
    return UserError(f"unknown {kind} {name}{where}.{sentence}{'.' if sentence and what[-1] != '?' else ''}")


def _meant(name: str, known: list[str], dashes: str, others_too: bool) -> str:
    # Imported where it is needed: most runs have no unknown flag.
    from .foreign import answer_to

    answer = answer_to(name) if others_too else None
    if answer is not None and answer.kind != "same":
        return answer.clause
    near = closest(name, known)
    return f"did you mean `{dashes}{near}`?" if near else ""
