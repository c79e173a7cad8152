"""What a flag of another trainer is here: four kinds of answers, and how each is put into words."""

import dataclasses
from collections.abc import Mapping

# The same flag; a flag of another name; nothing that this program needs; nothing that it has.
KINDS = ("same", "renamed", "not needed", "not supported")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one flag of another trainer is here.

    Attributes:
        kind: one of `KINDS`.
        ours: of a renamed flag, our flag and, if it is always the same, its value.
        note: what else to know: another meaning or default, why it is not needed, or what to do instead. Part of a
            sentence, without its full stop.
    """

    kind: str
    ours: str = ""
    note: str = ""

    @property
    def text(self) -> str:
        """The answer in a table."""
        found = f"called `{self.ours}`" if self.kind == "renamed" else self.kind
        return f"{found}: {self.note}" if self.note else found

    @property
    def clause(self) -> str:
        """The answer in a message about the flag."""
        found = f"`{self.ours}` here" if self.kind == "renamed" else self.kind
        return f"it is {found}: {self.note}" if self.note else f"it is {found}"


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Another trainer.

    Attributes:
        title: what it is called in a heading.
        source: which of its programs, of which version, the flags are from.
        flags: flag without dashes -> what it is here.
    """

    title: str
    source: str
    flags: Mapping[str, Answer]

    def alike(self) -> list[str]:
        """The flags that mean the same here, without any note."""
        return [name for name, answer in self.flags.items() if answer == same()]

    def others(self) -> dict[Answer, list[str]]:
        """All other flags by their answer."""
        found: dict[Answer, list[str]] = {}
        for name, answer in self.flags.items():
            if answer != same():
                found.setdefault(answer, []).append(name)
        return found


def same(note: str = "") -> Answer:
    """The same flag; the note says what differs."""
    return Answer("same", note=note)


def renamed(ours: str, note: str = "") -> Answer:
    """Another name here: `ours`, without dashes, and perhaps the value that it must have."""
    return Answer("renamed", f"--{ours}", note)


def unneeded(why: str) -> Answer:
    """Nothing has to be given here."""
    return Answer("not needed", note=why)


def unsupported(instead: str) -> Answer:
    """There is no such thing here."""
    return Answer("not supported", note=instead)
