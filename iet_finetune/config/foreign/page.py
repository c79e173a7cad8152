"""The tables of other trainers' flags as text for a terminal, and as the page docs/coming-from.md.

`python -m iet_finetune.config.foreign.page > docs/coming-from.md` writes the page after a table has changed.
"""

import textwrap
from collections.abc import Iterator

from . import TRAINERS
from .answers import Trainer

_INTRODUCTION = """\
# Coming from another trainer

Flags have the names of diffusers' own training scripts, so most of your command can stay as it is. These tables say
what each flag of other trainers is here. `train_iet_agc.py --help-from diffusers` (or `kohya`, or `simpletuner`)
prints them, and the error for an unknown flag uses the same words.

Three things differ from other trainers, because every shard trains a clone of its own:

* **Steps.** `--max_train_steps` and `--lr_warmup_steps` count the steps of each clone. `--total_train_steps` counts
  the steps of all clones together, as other trainers do, and so does `--checkpointing_steps`.
* **Batch.** `--train_batch_size` is the batch of one clone, however many GPUs there are: neither it nor the learning
  rate depends on their number.
* **Validation.** Images are drawn after every `--validation_rounds` rounds, when the clones have been merged.
"""


def table(trainer: str) -> str:
    """What each flag of a trainer, a key of `TRAINERS`, is here, for a terminal."""
    return "\n".join(_lines(TRAINERS[trainer]))


def _lines(trainer: Trainer) -> Iterator[str]:
    yield textwrap.fill(f"What the flags of {trainer.title} are here ({trainer.source}).", 119)
    yield "\nThe same here:\n"
    yield _indented(" ".join(f"--{name}" for name in trainer.alike()), 2)
    yield "\nOthers:\n"
    for answer, names in trainer.others().items():
        yield _indented(" ".join(f"--{name}" for name in names), 2)
        yield _indented(answer.text.replace("`", ""), 6)


def _indented(text: str, spaces: int) -> str:
    margin = " " * spaces
    return textwrap.fill(text, 119, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)


def page() -> str:
    """The text of docs/coming-from.md."""
    return "\n".join([_INTRODUCTION, *(line for trainer in TRAINERS.values() for line in _section(trainer))])


def _section(trainer: Trainer) -> Iterator[str]:
    yield f"## {trainer.title[0].upper()}{trainer.title[1:]}\n"
    yield textwrap.fill(f"From {trainer.source}.", 119) + "\n"
    yield textwrap.fill(f"The same here: {_listed(trainer.alike())}.", 119, break_on_hyphens=False) + "\n"
    yield "| there | here |"
    yield "| --- | --- |"
    yield from (f"| {_listed(names)} | {answer.text} |" for answer, names in trainer.others().items())
    yield ""


def _listed(names: list[str]) -> str:
    return ", ".join(f"`--{name}`" for name in names)


if __name__ == "__main__":
    print(page(), end="")
