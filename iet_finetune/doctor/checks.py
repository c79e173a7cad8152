"""Checks with budgets: each runs in a process of its own, and none of them can end or stall the others."""

import json
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..errors import one_line
from . import leave_driver_asleep

# A check's answer. On a CPU it says less than its words: some parts are left out, and models are tiny.
PASSED, PASSED_ON_CPU, FAILED, NOT_HERE = "passed", "passed, on a CPU", "FAILED", "not here"
# Seconds that a process has to end when its check is done.
_PATIENCE = 5


class NotHere(Exception):
    """The machine lacks what a check is about; the message says what."""


class Wrong(Exception):
    """A check found something wrong; the message says what."""


def expect(holds: bool, otherwise: str) -> None:
    """Raises `Wrong` with that message unless it holds."""
    if not holds:
        raise Wrong(otherwise)


@dataclass(frozen=True)
class Machine:
    """What a check may use.

    Attributes:
        device: "cuda" or "cpu".
        scratch: an empty folder of its own.
    """

    device: str
    scratch: Path

    @property
    def has_card(self) -> bool:
        """Whether there is a GPU."""
        return self.device == "cuda"

    def need_card(self) -> None:
        """Raises `NotHere` without a GPU."""
        if not self.has_card:
            raise NotHere("needs a card")


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: for `--only`.
        words: what it looks at, for the table.
        function: does it; writes numbers into the mapping as it finds them; raises `NotHere`, or `Wrong` at the end.
        seconds: after which it is ended.
    """

    name: str
    words: str
    function: Callable[[Machine, dict[str, Any]], None]
    seconds: int


@dataclass
class Outcome:
    """What came of a check: its answer, why, its numbers, and how long it took; `log` is what it printed."""

    name: str
    words: str
    answer: str = FAILED
    reason: str = ""
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    log: str = ""


def run_checks(checks: Sequence[Check]) -> Iterator[Outcome]:
    """Runs them one after the other, on the GPU if there is one, and yields what came of each.

    This process must not have used the GPU: its forks could not. `leave_driver_asleep` comes before all imports that
    may ask for one.
    """
    leave_driver_asleep()
    for check in checks:
        with tempfile.TemporaryDirectory(prefix="iet-doctor-") as folder:
            yield _run(check, Machine(device(), Path(folder)))


def device() -> str:
    """Where checks run: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _run(check: Check, machine: Machine) -> Outcome:
    # Forked: what takes seconds to import is there already.
    context = mp.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_in_process, args=(check, machine, theirs), daemon=True)
    began = time.monotonic()
    process.start()
    theirs.close()
    outcome = Outcome(check.name, check.words, reason=f"not done after {check.seconds} s")
    answered = False
    try:
        # Numbers come as they are found, the answer last; then the other end is closed.
        while ours.poll(max(0.0, began + check.seconds - time.monotonic())):
            outcome.found, answer = ours.recv()
            if answer is not None:
                outcome.answer, outcome.reason = answer
                answered = True
    except EOFError:
        process.join(_PATIENCE)
        if not answered:
            outcome.reason = f"its process ended with exit code {process.exitcode}"
    process.kill()
    process.join()
    outcome.seconds = round(time.monotonic() - began, 1)
    if outcome.answer == FAILED and (log := machine.scratch / "log").is_file():
        outcome.log = log.read_text(encoding="utf-8", errors="replace")[-6000:]
    return outcome


class _Told(dict[str, Any]):
    """A mapping that tells of every number when it is set; None, which is no number, is left out."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._tell = tell

    def __setitem__(self, key: str, value: Any) -> None:
        if value is not None:
            super().__setitem__(key, value)
            self._tell(dict(self))

    def update(self, *others: Any, **named: Any) -> None:
        """Tells of each."""
        for key, value in dict(*others, **named).items():
            self[key] = value


def _in_process(check: Check, machine: Machine, answers: Connection) -> None:
    log = (machine.scratch / "log").open("w", buffering=1, encoding="utf-8")
    # Libraries write to the one or the other.
    sys.stdout = sys.stderr = log
    for output in (1, 2):
        os.dup2(log.fileno(), output)
    found = _Told(lambda found: answers.send((found, None)))
    answer, reason = PASSED if machine.has_card else PASSED_ON_CPU, ""
    try:
        check.function(machine, found)
    except NotHere as error:
        answer, reason = NOT_HERE, str(error)
    except Wrong as error:
        answer, reason = FAILED, str(error)
    except BaseException as error:
        traceback.print_exc()
        answer, reason = FAILED, f"{type(error).__name__}: {one_line(error)}"
    answers.send((dict(found), (answer, reason)))
    answers.close()


def report(outcomes: Sequence[Outcome]) -> str:
    """What was found, as JSON."""
    return json.dumps({"checks": [asdict(each) for each in outcomes]}, indent=1, default=str) + "\n"


def shown(outcome: Outcome) -> str:
    """A row of the table, in Markdown."""
    numbers = "; ".join(f"{key} {_number(value)}" for key, value in outcome.found.items())
    said = "; ".join(filter(None, (outcome.reason, numbers)))
    cells = (outcome.words, outcome.answer, said, f"{outcome.seconds:.0f}")
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


HEAD = "| check | answer | found | s |\n| --- | --- | --- | ---: |"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
