"""Watching the other ranks of a run: who has died, who has reported an error, and an end for who cannot be told."""

import atexit
import contextlib
import json
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_GO_ON = (
    "Go on from the newest checkpoint with `--resume_from_checkpoint latest`, on any number of ranks that suits "
    "`--num_shards`."
)


class News(NamedTuple):
    """Why the run ends.

    Attributes:
        text: one line for the user.
        speaker: whether it is this rank that says it.
        deaf: the ranks that cannot hear of it.
    """

    text: str
    speaker: bool
    deaf: Sequence[int] = ()


class Stillness:
    """For how long a counter has stood still, counted only while this process was awake to look at it.

    A job that was suspended as a whole finds old counters when it goes on. So one gap between two looks never counts
    for more than `most` seconds.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._count: int | None = None
        self._seconds = 0.0
        self._looked = time.monotonic()

    def seconds(self, count: int) -> float:
        """Look at the counter: the seconds for which it has now been `count`."""
        gap, self._looked = time.monotonic() - self._looked, time.monotonic()
        self._seconds = 0.0 if count != self._count else self._seconds + min(gap, self._most)
        self._count = count
        return self._seconds


class Watch:
    """Two threads that find out why a run of several ranks has to end; `news` says so.

    The *looker* counts up its own beat in the store, looks whether the others' still move, and whether one of them has
    reported an error. The *guard* never touches the store: it sees when the looker is stuck there, and it ends this
    process when the main thread does not take notice of the news in time (a collective that waits for a dead rank
    cannot be interrupted). From a death to the end of every other rank, that takes at most `timeout` seconds:
    0.8 of it until a rank that does not beat is lost, looks included, and at most 0.2 for the main thread to notice.

    Args:
        looker_store: a handle of the store that nothing but the looker uses: a handle is for one thread.
        rank, size: this rank, and how many there are.
        timeout: in seconds.
    """

    def __init__(self, looker_store: "Store", rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.interval = min(max(timeout / 20, 0.2), 5.0)
        self.grace = min(0.2 * timeout, 10.0)
        self.limit = max(0.8 * timeout - 2 * self.interval, self.interval)
        # Without a store the ranks cannot agree who speaks: then it is the first one of each machine.
        self.speaks_alone = rank <= 1
        self.news: News | None = None
        self._store = looker_store
        self._lock = threading.Lock()
        self._told, self._noticed, self._closing, self._stopped = (threading.Event() for _ in range(4))
        self._looks = 0
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._look, self._guard)]

    def start(self) -> None:
        """Begin to watch. `stop` is then called before Python ends, for a thread in the store would abort it."""
        atexit.register(self.stop)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads; one that is stuck in the store is left behind. Calling it again does nothing."""
        looker, guard = self._threads
        self._closing.set()
        looker.join(self.grace)
        for event in (self._stopped, self._told, self._noticed):
            event.set()
        guard.join(self.grace)
        atexit.unregister(self.stop)

    def error(self) -> UserError | None:
        """The news as the error that ends the main thread, which has noticed it by this; None without news."""
        if self.news is None:
            return None
        self._noticed.set()
        error = UserError(self.news.text)
        error.speaker = self.news.speaker
        return error

    def wait_for_news(self) -> None:
        """Return when there is news, if it comes in time; for when a collective or the store has failed.

        A rank is known to be gone then, and only its number is missing: six missed beats suffice.
        """
        self.limit = min(self.limit, max(6 * self.interval, 1.0))
        self._told.wait(self.limit + 4 * self.interval)

    def report(self, store: "Store", text: str, deaf: Sequence[int] = ()) -> News:
        """Tell every rank why the run ends. Of several reports only the first counts; it becomes the news of all.

        Args:
            store: the calling thread's handle.
            text: one line for the user.
            deaf: the ranks that cannot hear it.

        Raises:
            RuntimeError: the store does not answer.
        """
        mine = json.dumps({"rank": self.rank, "text": " ".join(text.splitlines()), "deaf": [*deaf]})
        first = json.loads(store.compare_set("report", "", mine))
        return self._tell(News(first["text"], first["rank"] == self.rank, first["deaf"]))

    def confirm(self, store: "Store") -> None:
        """Say that this rank has heard the news."""
        with contextlib.suppress(RuntimeError):
            if self.news and self.rank not in self.news.deaf:
                store.set(f"heard/{self.rank}", "")

    def wait_until_heard(self, store: "Store") -> None:
        """Return when all who can have heard of the news, after `grace` seconds at most.

        Until then a speaker must not end, for launchers stop all ranks when the first one has failed; nor must rank 0,
        which may be the host of the store.
        """
        end = time.monotonic() + self.grace
        hearing = [f"heard/{rank}" for rank in range(self.size) if self.news and rank not in self.news.deaf]
        with contextlib.suppress(RuntimeError):
            while hearing and time.monotonic() < end and not store.check(hearing):
                time.sleep(0.02)

    def _tell(self, news: News) -> News:
        with self._lock:
            self.news = self.news or news
        self._told.set()
        return self.news

    def _look(self) -> None:
        stillness = {rank: Stillness(self.limit / 2) for rank in range(self.size) if rank != self.rank}
        try:
            while not self._closing.is_set():
                self._store.add(f"beat/{self.rank}", 1)
                still = {rank: s.seconds(self._store.add(f"beat/{rank}", 0)) for rank, s in stillness.items()}
                self._looks += 1
                if max(still.values()) > self.limit:
                    self._report_lost(still)
                if self._heard_within(self.interval):
                    self.confirm(self._store)
                    return
        except RuntimeError:  # all that the store raises
            if not self._closing.is_set():
                self._lose_contact()

    def _heard_within(self, seconds: float) -> bool:
        """Whether there is a report before the time is over; at once when the watch is closed."""
        end = time.monotonic() + seconds
        while not self._store.check(["report"]):
            left = end - time.monotonic()
            if left <= 0 or self._closing.wait(min(left, 0.5)):
                return False
        self.report(self._store, "")  # too late to count: it only reads
        return True

    def _report_lost(self, still: dict[int, float]) -> None:
        # With a machine, all its ranks die: a little patience less for the others, so that one line names them all.
        lost = [rank for rank, seconds in still.items() if seconds > self.limit - 2 * self.interval]
        who = f"rank {lost[0]} has" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))} have"
        they = "it has died or lost its" if len(lost) == 1 else "they have died or lost their"
        text = f"{who} not answered for {max(still.values()):.0f} s: {they} connection ({self._flag}). {_GO_ON}"
        self.report(self._store, text, lost)

    def _lose_contact(self) -> None:
        text = (
            f"lost contact with rank 0 or the launcher on its machine, where the ranks meet: it has died or lost its "
            f"connection ({self._flag}). {_GO_ON}"
        )
        self._tell(News(text, self.speaks_alone, range(self.size)))

    @property
    def _flag(self) -> str:
        return f"`--ddp_timeout {self.timeout:g}`"

    def _guard(self) -> None:
        stillness = Stillness(self.limit / 2)
        while not self._stopped.is_set() and not self._told.wait(self.interval):
            if stillness.seconds(self._looks) > self.limit:
                self._lose_contact()
        if not self._noticed.wait(self.grace) and not self._stopped.is_set():
            self._end()

    def _end(self) -> None:
        assert self.news is not None
        if self.news.speaker:
            # Not through sys.stderr: the stuck main thread may hold its lock.
            with contextlib.suppress(OSError):
                os.write(2, f"iet-finetune: error: {self.news.text}\n".encode())
        else:
            # Launchers stop all ranks when the first one has failed: the speaker goes first.
            time.sleep(self.interval)
        os._exit(1)
