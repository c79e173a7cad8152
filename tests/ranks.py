"""Starts real ranks: processes that find each other through torch.distributed and run a few lines of Python."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import Popen

ROOT = Path(__file__).parents[1]

# Ends as the command does: an error of the user is one line on one rank, and exit code 2.
PROGRAM = """
import json, os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from iet_finetune.errors import UserError
from iet_finetune.distributed.groups import Group, Placement, Ranks

TIMEOUT = float(os.environ["TEST_TIMEOUT"])

def emit(value):
    print(json.dumps(value), flush=True)

def die(how):
    emit(time.monotonic())
    os.kill(os.getpid(), how)

def work(ranks):
{body}

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
try:
    ranks = Ranks.join(TIMEOUT)
    with ranks.report_errors_once():
        work(ranks)
        ranks.leave()
except UserError as error:
    if error.printed_here:
        print(f"error: {{error}}", file=sys.stderr)
    else:
        emit(str(error))
    sys.exit(2)
"""


@dataclass(frozen=True)
class Ended:
    """A rank that has ended: its exit code, what it emitted, its stderr, and when it ended (monotonic clock)."""

    code: int
    output: list[Any]
    stderr: str
    at: float

    @property
    def said(self) -> list[str]:
        """The errors that the user sees of this rank, without what torch prints about broken connections."""
        return [line for line in self.stderr.splitlines() if line.startswith(("error: ", "iet-finetune: error: "))]


class Rank:
    """A running rank, which writes to files in `folder`."""

    def __init__(self, program: str, environment: Mapping[str, str], folder: Path) -> None:
        self._out, self._err = folder / "out", folder / "err"
        folder.mkdir()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = Popen(
                [sys.executable, "-c", program], env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        self.ended_at = 0.0

    def output(self) -> list[Any]:
        """What it has emitted so far."""
        lines = self._out.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def has_ended(self) -> bool:
        """Whether it has ended; the first look that finds it so notes when."""
        if not self.ended_at and self._process.poll() is not None:
            self.ended_at = time.monotonic()
        return self.ended_at > 0

    def send(self, signal: int) -> None:
        """Send it a signal."""
        self._process.send_signal(signal)

    def kill(self) -> None:
        """End it whatever it does."""
        self._process.kill()
        self._process.wait()
        self.has_ended()

    def end(self) -> Ended:
        """How it has ended."""
        return Ended(self._process.returncode, self.output(), self.stderr(), self.ended_at)

    def stderr(self) -> str:
        """What it has written there so far."""
        return self._err.read_text(encoding="utf-8")


@contextlib.contextmanager
def started(
    body: str, size: int, timeout: float = 60, environments: Mapping[int, Mapping[str, str]] | None = None
) -> Iterator[list[Rank]]:
    """Ranks that run `body`, the lines of a function of `ranks`; none is left running at the end of the block.

    Args:
        body: may use what PROGRAM imports, `emit(value)` for the test to read and `die(signal)`, which emits when.
        size: number of ranks.
        timeout: given to `Ranks.join`, in seconds.
        environments: rank -> environment variables besides.
    """
    program = PROGRAM.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    said_by_launchers = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"}
    shared = {
        **{name: value for name, value in os.environ.items() if name not in said_by_launchers},
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "TEST_TIMEOUT": str(timeout),
    }
    ranks: list[Rank] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(size):
                environment = {**shared, "RANK": str(rank), **(environments or {}).get(rank, {})}
                ranks.append(Rank(program, environment, Path(folder, str(rank))))
            yield ranks
        finally:
            for rank_ in ranks:
                rank_.kill()


def run_ranks(
    body: str,
    size: int,
    timeout: float = 60,
    environments: Mapping[int, Mapping[str, str]] | None = None,
    frozen: int | None = None,
) -> list[Ended]:
    """Run `body` on ranks as `started` does and return how each has ended; `frozen` is one that will not by itself."""
    with started(body, size, timeout, environments) as ranks:
        return wait(ranks, frozen)


def wait(ranks: list[Rank], frozen: int | None = None, limit: float = 60) -> list[Ended]:
    """Return when all ranks have ended, the frozen one killed last; fails when one runs on after `limit` seconds."""
    end = time.monotonic() + limit
    others = [rank for number, rank in enumerate(ranks) if number != frozen]
    while running := [rank for rank in others if not rank.has_ended()]:
        assert time.monotonic() < end, f"{len(running)} ranks hang: {[rank.stderr() for rank in ranks]}"
        time.sleep(0.01)
    if frozen is not None:
        ranks[frozen].kill()
    return [rank.end() for rank in ranks]


def wait_for_output(ranks: list[Rank], count: int, limit: float = 60) -> None:
    """Return when every rank has emitted `count` values."""
    end = time.monotonic() + limit
    while any(len(rank.output()) < count for rank in ranks):
        assert time.monotonic() < end, f"the ranks did not come that far: {[rank.stderr() for rank in ranks]}"
        time.sleep(0.01)


def free_port() -> int:
    """A port of this machine on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
