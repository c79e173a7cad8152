"""Programs that train one or a few steps at a time, so that several of them can take turns in one process."""

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from iet_finetune import Callback, Config, Trainer
from iet_finetune.data.loader import micro_batches
from iet_finetune.method.agc_rule import AGCRule
from iet_finetune.training import local as local_training
from iet_finetune.training.callbacks import StepFacts

# A program calls what it is given after every step, and does not go on before its next turn.
Program = Callable[[Callable[[], None]], None]


def allocate_as_in_a_run() -> None:
    """Lets all threads take memory from where the main thread does, which is where a run trains.

    glibc gives other threads arenas of their own, whose large blocks come and go in another way: with many clones a
    step took 8 % longer there.
    """
    arenas, one = -8, 1  # M_ARENA_MAX
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(arenas, one)


class Over(Exception):
    """Ends a program that would train on."""


class Turns:
    """A program in a thread of its own that runs only while `advance` waits for it."""

    def __init__(self, program: Program) -> None:
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(program,), daemon=True)
        self._thread.start()

    def advance(self, steps: int) -> None:
        """Return when it has taken so many steps more; raises what it raises."""
        for _ in range(steps):
            self._go.release()
            self._paused.acquire()
            if self._error is not None:
                raise self._error
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def close(self) -> None:
        """End it where it stands."""
        self._over = True
        self._go.release()
        self._thread.join()

    def _run(self, program: Program) -> None:
        try:
            self._wait()
            program(self._pause)
            raise RuntimeError("the program has no steps left")
        except Over:
            pass
        except BaseException as error:
            self._error = error
            self._paused.release()

    def _pause(self) -> None:
        self._paused.release()
        self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        if self._over:
            raise Over


class AfterStep(Callback):
    """Calls a function after each step."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def on_step_end(self, facts: StepFacts) -> None:
        """Calls it."""
        self._action()


class SteppedTrainer(Trainer):
    """The trainer, which calls a function after each step and writes no checkpoints."""

    def __init__(self, config: Config, after_step: Callable[[], None]) -> None:
        super().__init__(config, callbacks=[AfterStep(after_step)])

    def save_checkpoint(self, step: int, *, keep_older: bool = False) -> Path:
        """Nothing: the disk is not what is measured."""
        return self.output


def timed(function: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    """The function, with its seconds added to those of a part."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[part] += time.perf_counter() - began

    return wrapper


@contextlib.contextmanager
def parts_timed(trainer: Trainer, spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds of a step's parts while it trains; none of them lies within another."""
    local, family, ensemble = trainer.run.local, trainer.model.family, trainer.ensemble
    places = [
        (local._noising, "_encode", "encode images and captions"),
        (family, "predict", "denoise, forward"),
        (torch.Tensor, "backward", "backward"),
        (AGCRule, "keep", "anti-gradient control and records"),
        (local, "_record", "anti-gradient control and records"),
        (local, "_prepare_gradients", "gradient norm and clipping"),
        (local_training, "masked_step", "optimizer"),
        (ensemble, "checkout", "check out clones"),
        (ensemble, "collect", "collect clones"),
        (ensemble, "merge", "merge"),
    ]

    def read(*args: Any, **kwargs: Any) -> Iterator[Any]:
        iterator = micro_batches(*args, **kwargs)
        following = timed(lambda: next(iterator, None), spent, "data")
        return iter(following, None)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(local_training, "micro_batches", read))
        for owner, name, part in places:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), spent, part)))
        yield
