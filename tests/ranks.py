"""Starts real ranks: processes that find each other through torch.distributed and run a few lines of Python.

They are forked from one process that has imported torch, for an import takes longer than most of what ranks do; from
there on each lives, and ends, as any Python process does.
"""

import contextlib
import functools
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
        files = [str(self._out), str(self._err)]
        self._pid: int = _ask({"program": program, "environment": {**environment}, "files": files})
        self.code: int | None = None
        self.ended_at = 0.0

    def output(self) -> list[Any]:
        """What it has emitted so far."""
        lines = self._out.read_text(encoding="utf-8").splitlines(keepends=True) if self._out.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def has_ended(self) -> bool:
        """Whether it has ended; the first look that finds it so notes when."""
        if self.code is None:
            self.code = _ask({"code_of": self._pid})
            self.ended_at = time.monotonic()
        return self.code is not None

    def send(self, signal: int) -> None:
        """Send it a signal."""
        os.kill(self._pid, signal)

    def end(self) -> Ended:
        """How it has ended."""
        assert self.code is not None
        return Ended(self.code, self.output(), self.stderr(), self.ended_at)

    def stderr(self) -> str:
        """What it has written there so far."""
        return self._err.read_text(encoding="utf-8") if self._err.exists() else ""


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
    shared = {
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
                _kill(rank_)


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
        _kill(ranks[frozen])
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


def _kill(rank: Rank) -> None:
    while not rank.has_ended():
        rank.send(9)
        time.sleep(0.01)


@functools.cache
def _nursery() -> "subprocess.Popen[str]":
    """The process from which ranks are forked; it ends with the one that asks, when its stdin does."""
    said_by_launchers = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"}
    environment = {name: value for name, value in os.environ.items() if name not in said_by_launchers}
    # One thread: a process with several must not fork.
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(request: Mapping[str, Any]) -> Any:
    nursery = _nursery()
    assert nursery.stdin
    assert nursery.stdout
    print(json.dumps(request), file=nursery.stdin, flush=True)
    return json.loads(nursery.stdout.readline())


def _serve() -> str:
    """Fork ranks as asked on stdin; returns in each of them, with its program."""
    for line in sys.stdin:
        request = json.loads(line)
        if "code_of" in request:
            pid, status = os.waitpid(request["code_of"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                _become_rank(request)
                return request["program"]
        print(json.dumps(answer), flush=True)
    sys.exit()


def _become_rank(request: Mapping[str, Any]) -> None:
    os.environ.update(request["environment"])
    for descriptor, name in enumerate(["/dev/null", *request["files"]]):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), descriptor)


if __name__ == "__main__":
    import iet_finetune.distributed.groups  # noqa: F401 - what every rank imports

    exec(compile(_serve(), "rank", "exec"), {"__name__": "__main__"})
