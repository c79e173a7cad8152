"""Barriers with a timeout, and one error for all ranks when one of them fails."""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError, one_line
from .watchdog import Watchdog

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# What gloo and NCCL report when a peer is gone; they share no exception class.
_BROKEN = re.compile(
    r"gloo|nccl|connection (was )?(likely )?(closed|reset|refused)|broken pipe|application timeout", re.IGNORECASE
)


class Coordinator:
    """Barriers, object gathering and error reporting through torch.distributed's store; `Ranks` adds the collectives.

    A single rank has neither store nor watchdog and never waits.

    Attributes:
        rank: the number of this rank, from 0 to size - 1.
        size: how many ranks there are.
        local_rank, local_size: the number of this rank on its machine, and how many there are on it.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: "Store | None" = None, watchdog: Watchdog | None = None
    ) -> None:
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = 0, 1
        self._maybe_store, self._watchdog = store, watchdog
        self._barriers = 0
        self._stale: list[str] = []  # keys that every rank has read by the time it reaches the next barrier
        self._left = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes shared files."""
        return self.rank == 0

    def check(self) -> None:
        """Returns at once unless the run has failed. Cheap enough for every step: it reads one variable.

        Raises:
            UserError: another rank has reported an error or is lost; `printed_here` is set.
        """
        error = self._watchdog.error() if self._watchdog else None
        if error is not None:
            raise error

    def in_time(self) -> contextlib.AbstractContextManager[None]:
        """Inside is what waits for other ranks on a device, and so cannot be interrupted.

        If it takes longer than `--ddp_timeout`, the run ends as if a rank were lost.
        """
        return self._watchdog.in_time() if self._watchdog else contextlib.nullcontext()

    def barrier(self) -> None:
        """Returns when every rank has called it; raises as `check` does."""
        if self._watchdog is None:
            return
        with self._failure_explained():
            self._barrier()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, ordered by rank, on every rank; raises as `check` does.

        Args:
            value: small and serializable as JSON. It is returned as JSON stores it: tuples become lists, keys become
                strings, floats stay exact.
        """
        text = json.dumps(value)
        if self._watchdog is None:
            return [json.loads(text)]
        with self._failure_explained():
            keys = [f"gather/{self._barriers}/{rank}" for rank in range(self.size)]
            self._store.set(keys[self.rank], text)
            self._barrier()
            values = [json.loads(self._store.get(key)) for key in keys]
            self._stale += keys
        return values

    @contextlib.contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Runs the block on the first rank of every machine, then on the others, so that caches are filled once.

        `report_errors_once` passes an exception of a first rank on to the others.
        """
        if self.local_rank > 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()

    @contextlib.contextmanager
    def report_errors_once(self) -> Iterator[None]:
        """Wraps a run: when one rank fails, all ranks stop, and one of them prints why.

        An exception in the block is reported to the other ranks, whose `check` raises it. Only the first report
        counts. Its rank raises the exception unchanged, a `UserError` with `printed_here` True. Every other rank
        raises a `UserError` with the same text and `printed_here` False in place of its own exception. A failed
        collective is never given as the reason; the lost rank is. Ctrl-C and `SystemExit` are not reported. Any
        exception stops the watchdog.
        """
        try:
            yield
        except BaseException as error:
            if self._watchdog is None:
                raise
            try:
                instead = self._settled(error)
            finally:
                self._left = True
                self._watchdog.stop()
            if instead is None:
                raise
            raise instead from None

    def is_last_to(self, what: str) -> bool:
        """Whether this rank is the last one to call this with `what`. No rank waits.

        Args:
            what: a name that every rank uses exactly once.

        Raises:
            UserError: as `check` does.
        """
        self.check()
        if self._watchdog is None:
            return True
        with self._failure_explained():
            return self._store.add(f"last/{what}", 1) == self.size

    def leave(self) -> None:
        """Stops the watchdog once every rank has called this; raises as `check` does. Call it last.

        Does nothing after an exception, because `report_errors_once` has stopped the watchdog already.
        """
        if self._watchdog is None or self._left:
            return
        self._left = True
        try:
            self.barrier()
        finally:
            self._watchdog.stop()
        end = time.monotonic() + self._watchdog.grace
        with contextlib.suppress(RuntimeError):  # the other ranks need nothing more from this one
            left = self._store.add("left", 1)
            # Rank 0 may host the store.
            while self.is_main and left < self.size and time.monotonic() < end:
                time.sleep(0.01)
                left = self._store.add("left", 0)

    @property
    def _store(self) -> "Store":
        assert self._maybe_store is not None, "a single rank has no store"
        return self._maybe_store

    def _barrier(self) -> None:
        self.check()
        arrived, done = f"arrived/{self._barriers}", f"done/{self._barriers}"
        self._barriers += 1
        if self._store.add(arrived, 1) == self.size:
            self._store.set(done, "")
            for key in self._stale:
                self._store.delete_key(key)
        # Not `wait` with a timeout: each expired one prints two warnings.
        pause = 0.001
        while not self._store.check([done]):
            time.sleep(pause)
            pause = min(1.5 * pause, 0.05)
            self.check()
        self._stale = [arrived, done]

    @contextlib.contextmanager
    def _failure_explained(self) -> Iterator[None]:
        """Replaces an error caused by a lost rank by the one that names the rank."""
        try:
            yield
        except RuntimeError as error:
            if self._watchdog is None or not _is_broken_connection(error):
                raise
            self._watchdog.wait_for_failure()
            failure = self._watchdog.error()
            if failure is None:
                raise
            raise failure from None

    def _settled(self, error: BaseException) -> UserError | None:
        """Returns what to raise in place of `error`, so that only one rank prints it; None to raise `error` itself."""
        assert self._watchdog is not None
        if _is_broken_connection(error):
            self._watchdog.wait_for_failure()
        instead = self._watchdog.error()  # with a failure known, a KeyboardInterrupt comes from the launcher
        if instead is None and isinstance(error, Exception) and self._first_to_report(error):
            if isinstance(error, UserError):
                error.printed_here = True
        elif instead is None:
            instead = self._watchdog.error()
        self._watchdog.acknowledge(self._store)
        if self.is_main or instead is None or instead.printed_here:
            with contextlib.suppress(KeyboardInterrupt):  # from the launcher: every rank knows by then
                self._watchdog.wait_for_acknowledgements(self._store)
        return instead

    def _first_to_report(self, error: Exception) -> bool:
        assert self._watchdog is not None
        try:
            first = self._watchdog.report(self._store, _as_one_line(error, self.rank)).printed_here
        except RuntimeError:  # without the store nobody decides: printing twice beats not printing
            return True
        self._watchdog.error()  # acknowledges it
        return first


def _is_broken_connection(error: BaseException) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None


def _as_one_line(error: Exception, rank: int) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"rank {rank} ended with {type(error).__name__}: {one_line(error)}"
