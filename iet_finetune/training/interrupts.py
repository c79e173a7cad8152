"""Ctrl-C and SIGTERM while a clone trains: the step under way is finished first; the second one ends it at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..config.config import Config
from ..files import complete_checkpoints

# The files of class images that the base model drew.
DRAWN = "drawn-*.png"


class Interrupts:
    """Notes that the run is asked to stop.

    Several ranks would have to agree on a step: with them, and wherever somebody else handles these signals, they do
    what they always did.

    Args:
        is_alone: whether there is but one rank.

    Attributes:
        asked: whether the run is to stop after the step under way.
    """

    def __init__(self, is_alone: bool) -> None:
        self._is_alone = is_alone
        self.asked = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, the first signal is noted alone, and the next one raises `KeyboardInterrupt` as it did before."""
        if not self._is_alone or threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        usual = signal.default_int_handler
        numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is usual]
        for number in numbers:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number in numbers:
                signal.signal(number, usual)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def end_if_asked(self) -> None:
        """Raises `KeyboardInterrupt` if the run is to stop; what it has learned is in a checkpoint by now."""
        if self.asked:
            raise KeyboardInterrupt


def how_to_go_on(output: Path, class_images: Path | None = None) -> str:
    """What helps after an interruption, in words.

    Args:
        output: folder of the run.
        class_images: where it draws class images, which are kept; None if it draws none.
    """
    if saved := complete_checkpoints(output):
        return f"`--resume_from_checkpoint latest` goes on from {saved[-1].name}"
    drawn = len(list(class_images.glob(DRAWN))) if class_images is not None else 0
    kept = f", and keeps the class images drawn so far ({drawn})" if drawn else ""
    return f"there is no checkpoint yet: the same command with `--resume_from_checkpoint latest` starts over{kept}"


def what_helps(config: Config, started_in: Path = Path()) -> str:
    """The same for the run of a configuration.

    Args:
        started_in: what relative folders are relative to.
    """
    class_images = started_in / config.class_path if config.prior.is_on else None
    return how_to_go_on(started_in / config.output_path, class_images)


@contextmanager
def says_how_to_go_on(config: Config) -> Iterator[None]:
    """Inside, a `KeyboardInterrupt` that does not say what helps is raised as one that does."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if interrupt.args:
            raise
        raise KeyboardInterrupt(what_helps(config)) from None
