"""All that is wrong with a source of images, said at once."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import UserError

# How many of each kind are named; the others are counted.
SHOWN = 10
EXAMPLE = '{"file_name": "cat.png", "text": "a cat on a sofa"}'


class Kind(NamedTuple):
    """A kind of fault: what one has, what several have, and what to do about it."""

    one: str
    several: str
    remedy: str


_LEAVE_OUT = "Replace or remove them, or leave them out with `--skip_bad_images`."
# What errors of one image end with, and a list of faults says once.
_ADVICE = ("Replace or remove it.", "Convert it to 8-bit RGB.", "Put it back, or remove its row from the data.")
UNREADABLE = Kind("image cannot be read", "images cannot be read", _LEAVE_OUT)
MISSING = Kind("row names a file that is not there", "rows name files that are not there", _LEAVE_OUT)
NO_CAPTION = Kind(
    "image has no caption",
    "images have no caption",
    f"Add rows such as {EXAMPLE} to metadata.jsonl, or text files of the images' names, or give "
    "`--default_caption TEXT` or `--caption_from folder`.",
)
NO_ROW = Kind(
    "image is in no row of the tables beside it",
    "images are in no row of the tables beside them",
    "Add their rows or move them away.",
)
TWO_CAPTIONS = Kind(
    "image has different captions in two places",
    "images have different captions in two places",
    "Keep one of the places.",
)
BAD_ROW = Kind("row is wrong", "rows are wrong", f"A row looks like {EXAMPLE}.")
NO_VALUE = Kind("row lacks a value", "rows lack a value", "Every image needs one.")


class Faults:
    """Collects faults by kind, to raise them together.

    Args:
        source: what has them, such as "`--train_data_dir data/cats`".
        folder: whose files are named relative to it.
    """

    def __init__(self, source: str, folder: str | None = None) -> None:
        self.source = source
        self._folder = folder
        self._found: dict[Kind, list[str]] = {}
        self._hints: list[str] = []

    def hint(self, words: str) -> None:
        """Notes what may be the cause of faults."""
        self._hints.append(words)

    def take(self, kind: Kind) -> list[str]:
        """Takes out the faults of a kind, which are none then, and returns their names."""
        return self._found.pop(kind, [])

    def add(self, kind: Kind, name: str) -> None:
        """Notes that `name`, with whatever is to be said of it, has a fault of this kind."""
        self._found.setdefault(kind, []).append(name)

    def raise_if_any(self) -> None:
        """Raises a `UserError` that says of every kind how many there are, names the first ten, and says what to do.

        Raises:
            UserError: there are faults.
        """
        if not self._found:
            return
        told = [
            f"{len(names)} {kind.one if len(names) == 1 else kind.several} ({shown(list(map(self._shortly, names)))})"
            for kind, names in self._found.items()
        ]
        remedies = dict.fromkeys([*(kind.remedy for kind in self._found), *self._hints])
        raise UserError(f"{self.source}: {'; '.join(told)}. {' '.join(remedies)}")

    def _shortly(self, name: str) -> str:
        """Without the folder and without advice, which follows."""
        name = without_advice(name)
        return name if self._folder is None else name.replace(f"`{os.path.join(self._folder, '')}", "`")


def without_advice(text: str) -> str:
    """What is wrong with one image, without what to do about it."""
    for advice in _ADVICE:
        text = text.removesuffix(f" {advice}")
    return text.rstrip(".")


def shown(names: Sequence[str], most: int = SHOWN) -> str:
    """The first names, and how many others there are."""
    others = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *others])
