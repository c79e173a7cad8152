"""Detects lost ranks and reported errors, and ends a process that is stuck in a collective."""

import atexit
import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_RESUME = (
    "Resume from the newest checkpoint with `--resume_from_checkpoint latest`, on any number of ranks that suits "
    "`--num_shards`."
)


class Failure(NamedTuple):
    """Why the run ends.

    Attributes:
        text: one line for the user.
        printed_here: whether this rank prints it.
        unreachable: the ranks that cannot learn of it.
    """

    text: str
    printed_here: bool
    unreachable: Sequence[int] = ()


class StallTimer:
    """Measures how long a counter has not moved, counting only the time this process was awake.

    A job that was suspended as a whole finds old counters when it continues, so the gap between two polls never counts
    for more than `max_gap` seconds.
    """

    def __init__(self, max_gap: float) -> None:
        self._max_gap = max_gap
        self._count: int | None = None
        self._seconds = 0.0
        self._polled = time.monotonic()

    def seconds(self, count: int) -> float:
        """Returns for how many seconds the counter has been `count`."""
        gap, self._polled = time.monotonic() - self._polled, time.monotonic()
        self._seconds = 0.0 if count != self._count else self._seconds + min(gap, self._max_gap)
        self._count = count
        return self._seconds


class Watchdog:
    """Two threads that detect why a run on several ranks has to end, and set `failure`.

    The *monitor* increments its own heartbeat in the store, checks that those of the others move, and reads reported
    errors. The *guard* never touches the store. It notices when the monitor is stuck there, and it ends this process
    when the main thread does not acknowledge the failure in time, because a collective that waits for a dead rank
    cannot be interrupted. Every other rank has ended at most `timeout` seconds after a death: 0.8 of it to declare a
    silent rank lost, polling included, and 0.2 for the main thread to acknowledge.

    A collective, or a step of a group, that takes longer than `timeout` while all ranks are alive ends the run, too.
    What NCCL itself does about that is switched off: it may end a rank before it has said why.

    Args:
        monitor_store: a store handle that only the monitor uses; a handle serves one thread.
        rank, size: this rank, and the number of ranks.
        timeout: in seconds.
    """

    def __init__(self, monitor_store: "Store", rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.interval = min(max(timeout / 20, 0.2), 5.0)
        self.grace = min(0.2 * timeout, 10.0)
        self.limit = max(0.8 * timeout - 2 * self.interval, self.interval)
        # Without a store the ranks cannot agree on one that prints: the first rank of each machine does.
        self.prints_without_store = rank <= 1
        self.failure: Failure | None = None
        self._store = monitor_store
        self._lock = threading.Lock()
        self._failed, self._acknowledged, self._closing, self._stopped = (threading.Event() for _ in range(4))
        self._polls = 0
        self._timed = 0  # beginnings and ends of `in_time`: odd inside
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._monitor, self._guard)]

    def start(self) -> None:
        """Starts both threads. `stop` runs before Python exits, because a thread in the store would abort it."""
        atexit.register(self.stop)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends both threads; one that is stuck in the store is abandoned. Calling it again does nothing."""
        monitor, guard = self._threads
        self._closing.set()
        monitor.join(self.grace)
        for event in (self._stopped, self._failed, self._acknowledged):
            event.set()
        guard.join(self.grace)
        atexit.unregister(self.stop)

    @contextlib.contextmanager
    def in_time(self) -> Iterator[None]:
        """Inside is what must not take longer than `timeout`."""
        self._timed += 1
        try:
            yield
        finally:
            self._timed += 1

    def error(self) -> UserError | None:
        """Returns the failure as an error for the main thread to raise, and acknowledges it; None without one."""
        if self.failure is None:
            return None
        self._acknowledged.set()
        error = UserError(self.failure.text)
        error.printed_here = self.failure.printed_here
        return error

    def wait_for_failure(self) -> None:
        """Waits until the failure is known, or time is up. Call it after a collective or the store has failed.

        A rank is known to be gone then and only its number is missing, so six missed heartbeats are enough.
        """
        self.limit = min(self.limit, max(6 * self.interval, 1.0))
        self._failed.wait(self.limit + 4 * self.interval)

    def report(self, store: "Store", text: str, unreachable: Sequence[int] = ()) -> Failure:
        """Reports to every rank why the run ends. The first report becomes the failure of all ranks.

        Args:
            store: the calling thread's handle.
            text: one line for the user.
            unreachable: the ranks that cannot learn of it.

        Raises:
            RuntimeError: the store does not answer.
        """
        mine = json.dumps({"rank": self.rank, "text": " ".join(text.splitlines()), "unreachable": [*unreachable]})
        first = json.loads(store.compare_set("report", "", mine))
        return self._set_failure(Failure(first["text"], first["rank"] == self.rank, first["unreachable"]))

    def acknowledge(self, store: "Store") -> None:
        """Tells the other ranks that this one knows of the failure."""
        with contextlib.suppress(RuntimeError):
            if self.failure and self.rank not in self.failure.unreachable:
                store.set(f"acknowledged/{self.rank}", "")

    def wait_for_acknowledgements(self, store: "Store") -> None:
        """Waits, at most `grace` seconds, until every reachable rank knows of the failure.

        The rank that prints must not exit before, because launchers stop all ranks when the first one fails. Nor must
        rank 0, which may host the store.
        """
        end = time.monotonic() + self.grace
        unreachable = self.failure.unreachable if self.failure else range(self.size)
        reachable = [f"acknowledged/{rank}" for rank in range(self.size) if rank not in unreachable]
        with contextlib.suppress(RuntimeError):
            while reachable and time.monotonic() < end and not store.check(reachable):
                time.sleep(0.02)

    def _set_failure(self, failure: Failure) -> Failure:
        with self._lock:
            self.failure = self.failure or failure
        self._failed.set()
        return self.failure

    def _monitor(self) -> None:
        timers = {rank: StallTimer(self.limit / 2) for rank in range(self.size) if rank != self.rank}
        timed = StallTimer(self.limit / 2)
        try:
            while not self._closing.is_set():
                self._store.add(f"heartbeat/{self.rank}", 1)
                silent = {
                    rank: timer.seconds(self._store.add(f"heartbeat/{rank}", 0)) for rank, timer in timers.items()
                }
                self._polls += 1
                if max(silent.values()) > self.limit:
                    self._report_lost(silent)
                inside = self._timed
                if timed.seconds(inside) > self.timeout and inside % 2:
                    self.report(self._store, self._stuck)
                if self._reported_within(self.interval):
                    self.acknowledge(self._store)
                    return
        except RuntimeError:  # the only error that the store raises
            if not self._closing.is_set():
                self._lose_contact()

    def _reported_within(self, seconds: float) -> bool:
        """Waits at most `seconds` for a report; returns whether there is one, at once when closing."""
        end = time.monotonic() + seconds
        while not self._store.check(["report"]):
            left = end - time.monotonic()
            if left <= 0 or self._closing.wait(min(left, 0.5)):
                return False
        self.report(self._store, "")  # comes too late to count, so it only reads
        return True

    def _report_lost(self, silent: dict[int, float]) -> None:
        # A machine takes all its ranks with it: a slightly lower limit for the others lets one line name them all.
        lost = [rank for rank, seconds in silent.items() if seconds > self.limit - 2 * self.interval]
        who = f"rank {lost[0]} has" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))} have"
        they = "it has died or lost its" if len(lost) == 1 else "they have died or lost their"
        text = f"{who} not answered for {max(silent.values()):.0f} s: {they} connection ({self._flag}). {_RESUME}"
        self.report(self._store, text, lost)

    def _lose_contact(self) -> None:
        text = (
            "lost contact with rank 0 or the launcher on its machine, which connects the ranks: it has died or lost "
            f"its connection ({self._flag}). {_RESUME}"
        )
        self._set_failure(Failure(text, self.prints_without_store, range(self.size)))

    @property
    def _stuck(self) -> str:
        return f"all ranks are there, but tensors no longer go from one to the other ({self._flag}). {_RESUME}"

    @property
    def _flag(self) -> str:
        return f"`--ddp_timeout {self.timeout:g}`"

    def _guard(self) -> None:
        timer = StallTimer(self.limit / 2)
        while not self._stopped.is_set() and not self._failed.wait(self.interval):
            if timer.seconds(self._polls) > self.limit:
                self._lose_contact()
        if not self._acknowledged.wait(self.grace) and not self._stopped.is_set():
            self._end()

    def _end(self) -> None:
        assert self.failure is not None
        if self.failure.printed_here:
            # Not through sys.stderr, whose lock the stuck main thread may hold.
            with contextlib.suppress(OSError):
                os.write(2, f"iet-finetune: error: {self.failure.text}\n".encode())
        else:
            # Launchers stop all ranks when the first one fails: the one that prints exits first.
            time.sleep(self.interval)
        os._exit(1)
