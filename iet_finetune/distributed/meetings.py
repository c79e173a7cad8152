"""How the ranks of a run wait for each other, with a timeout, and end together when one of them fails."""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError, one_line
from .watch import Watch

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# What gloo and NCCL say when a peer is gone; they have no exception class in common.
_BROKEN = re.compile(
    r"gloo|nccl|connection (was )?(likely )?(closed|reset|refused)|broken pipe|application timeout", re.IGNORECASE
)


class Meetings:
    """The ranks of a run, as one of them sees them: meeting, telling, failing; `groups.Ranks` adds the collectives.

    They meet on the store of torch.distributed. A rank alone has no store and no watch, and waits for nobody.

    Attributes:
        rank: the number of this rank, from 0 to size - 1.
        size: how many ranks there are.
        local_rank, local_size: the number of this rank on its machine, and how many there are on it.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: "Store | None" = None, watch: Watch | None = None) -> None:
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = 0, 1
        self._maybe_store, self._watch = store, watch
        self._meetings = 0
        self._stale: list[str] = []  # keys in the store that all have read when they come to the next meeting
        self._left = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def check(self) -> None:
        """Return at once if nothing is known that ends the run. For every step: it looks at a variable, no more.

        Raises:
            UserError: another rank has reported an error, or a rank is lost; with its `speaker` settled.
        """
        error = self._watch.error() if self._watch else None
        if error is not None:
            raise error

    def meet(self) -> None:
        """Return when every rank has come to this meeting; raises as `check` does."""
        if self._watch is None:
            return
        with self._failure_explained():
            self._meet()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank, for every rank; raises as `check` does.

        Args:
            value: small and made of what JSON knows; it comes back as JSON has it (tuples are lists, keys are strings,
                floats are exact).
        """
        text = json.dumps(value)
        if self._watch is None:
            return [json.loads(text)]
        with self._failure_explained():
            keys = [f"gather/{self._meetings}/{rank}" for rank in range(self.size)]
            self._store.set(keys[self.rank], text)
            self._meet()
            values = [json.loads(self._store.get(key)) for key in keys]
            self._stale += keys
        return values

    @contextlib.contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """The block runs on the first rank of every machine, then on the others: caches are filled once a machine.

        What it raises on a first rank the others learn through `one_voice`.
        """
        if self.local_rank > 0:
            self.meet()
        yield
        if self.local_rank == 0:
            self.meet()

    @contextlib.contextmanager
    def one_voice(self) -> Iterator[None]:
        """Around a run: what ends one rank ends all, and one of them says why.

        An exception in the block is reported to the other ranks, whose `check` raises it. Of several, the first
        counts: on its rank it goes on unchanged, a `UserError` with `speaker` True; on all others a `UserError` with
        the same text and `speaker` False takes the place of what they raised. That a collective failed is never the
        reason: the rank that is lost is. Ctrl-C and `SystemExit` are not reported. The watch ends with any exception.
        """
        try:
            yield
        except BaseException as error:
            if self._watch is None:
                raise
            try:
                instead = self._settled(error)
            finally:
                self._left = True
                self._watch.stop()
            if instead is None:
                raise
            raise instead from None

    def last_to(self, what: str) -> bool:
        """Whether this rank is the last of all to say that it has done something; nobody waits.

        Args:
            what: its name, of which each rank makes use once; the same on all ranks.

        Raises:
            UserError: as `check` does.
        """
        self.check()
        if self._watch is None:
            return True
        with self._failure_explained():
            return self._store.add(f"last/{what}", 1) == self.size

    def leave(self) -> None:
        """End the watch when all ranks have come here; raises as `check` does. The last thing that is called.

        After an exception `one_voice` has done what is to be done, and it does nothing.
        """
        if self._watch is None or self._left:
            return
        self._left = True
        try:
            self.meet()
        finally:
            self._watch.stop()
        end = time.monotonic() + self._watch.grace
        with contextlib.suppress(RuntimeError):  # the others have all they need, even if they die now
            left = self._store.add("left", 1)
            # Rank 0 may be the host of the store.
            while self.is_main and left < self.size and time.monotonic() < end:
                time.sleep(0.01)
                left = self._store.add("left", 0)

    @property
    def _store(self) -> "Store":
        assert self._maybe_store is not None, "a rank alone has no store"
        return self._maybe_store

    def _meet(self) -> None:
        self.check()
        come, done = f"come/{self._meetings}", f"done/{self._meetings}"
        self._meetings += 1
        if self._store.add(come, 1) == self.size:
            self._store.set(done, "")
            for key in self._stale:
                self._store.delete_key(key)
        # Not `wait` with a timeout: each one that runs out prints two warnings.
        pause = 0.001
        while not self._store.check([done]):
            time.sleep(pause)
            pause = min(1.5 * pause, 0.05)
            self.check()
        self._stale = [come, done]

    @contextlib.contextmanager
    def _failure_explained(self) -> Iterator[None]:
        """What fails because another rank is gone ends in the news of it."""
        try:
            yield
        except RuntimeError as error:
            if self._watch is None or not _is_broken_connection(error):
                raise
            self._watch.wait_for_news()
            news = self._watch.error()
            if news is None:
                raise
            raise news from None

    def _settled(self, error: BaseException) -> UserError | None:
        """What is raised in the place of `error`, so that all ranks end with one voice; None if that is to be it."""
        assert self._watch is not None
        if _is_broken_connection(error):
            self._watch.wait_for_news()
        instead = self._watch.error()  # a KeyboardInterrupt, too, is then the launcher's answer to it
        if instead is None and isinstance(error, Exception) and self._first_to_report(error):
            if isinstance(error, UserError):
                error.speaker = True
        elif instead is None:
            instead = self._watch.error()
        self._watch.confirm(self._store)
        if self.is_main or instead is None or instead.speaker:
            with contextlib.suppress(KeyboardInterrupt):  # of the launcher: then one has ended, and all have heard
                self._watch.wait_until_heard(self._store)
        return instead

    def _first_to_report(self, error: Exception) -> bool:
        assert self._watch is not None
        try:
            first = self._watch.report(self._store, _as_one_line(error, self.rank)).speaker
        except RuntimeError:  # without the store nobody decides: better said twice than not at all
            return True
        self._watch.error()  # noticed
        return first


def _is_broken_connection(error: BaseException) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None


def _as_one_line(error: Exception, rank: int) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"rank {rank} ended with {type(error).__name__}: {one_line(error)}"
