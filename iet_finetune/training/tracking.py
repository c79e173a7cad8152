"""Where the numbers of a run go: files of JSON lines, the progress bar, and trackers."""

import json
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from ..config.config import Config
from ..files import written_beside


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Appends one JSON line to a file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(values) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the JSON lines of a file, without the incomplete last line that a killed process leaves."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def cut_back(path: Path, rounds: int) -> None:
    """Removes the lines of rounds above `rounds`, which a resumed run trains again."""
    kept = [line for line in read_lines(path) if line["round"] <= rounds]
    with written_beside(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


class Progress:
    """A progress bar over the steps of all clones or, without a terminal, one line a round.

    `silent` is for the ranks that do not print.
    """

    def __init__(self, total_steps: int, done: int, silent: bool = False) -> None:
        self._silent = silent
        self._terminal = sys.stderr.isatty() and not silent
        self._bar = tqdm(total=total_steps, initial=done, unit="step", disable=not self._terminal, dynamic_ncols=True)
        self._images = 0
        self._since = time.perf_counter()

    def reach(self, steps: int, samples: int) -> None:
        """Moves to `steps` steps of all clones together, after another `samples` images."""
        self._images += samples
        self._bar.update(steps - self._bar.n)

    def describe(self, place: str, loss: float, skip_rate: float) -> None:
        """Shows where the run stands and how fast it is."""
        if self._terminal:
            now = time.perf_counter()
            speed, self._images, self._since = self._images / max(now - self._since, 1e-9), 0, now
            self._bar.set_description(place, refresh=False)
            self._bar.set_postfix_str(f"loss {loss:.4f}, skipped {skip_rate:.1%}, {speed:.1f} images/s")

    def say(self, text: str) -> None:
        """Prints one line that stays."""
        if self._terminal:
            self._bar.write(text, file=sys.stderr)
        elif not self._silent:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar where it is."""
        self._bar.close()


def tensorboard_command(config: Config) -> str | None:
    """What shows the curves of a run in a browser; None where TensorBoard does not get them."""
    settings = config.logging
    if settings.report_to not in ("tensorboard", "all"):
        return None
    return f"tensorboard --logdir {shlex.quote(str(config.output_path / settings.logging_dir))}"


class Trackers:
    """Accelerate's trackers, passed only what they accept."""

    def __init__(self, accelerator: Accelerator, project: str, flags: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        # TensorBoard refuses lists and None in a configuration.
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in flags.items()}
        accelerator.init_trackers(project, plain)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers at a step, counted over all clones."""
        self._accelerator.log(dict(values), step=step)

    def log_clone(self, values: Mapping[str, float], curve: str, clone_step: int, step: int) -> None:
        """Logs numbers of one clone's step, as curves of their own over the steps of that clone.

        TensorBoard has a step for each curve. Other trackers have one for all, which may not go back from one clone to
        the next; they are told the clone's step as a number beside the others.

        Args:
            curve: begins the names of the curves.
            clone_step: of that clone alone.
            step: of all clones together.
        """
        named = {f"{curve}{name}": value for name, value in values.items()}
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log(named, step=clone_step)
            else:
                tracker.log({**named, f"{curve}step": clone_step}, step=step)

    def log_images(self, name: str, images: Iterable[Any], captions: list[str], step: int) -> None:
        """Logs PIL images to the trackers that show images."""
        import numpy as np

        shown = list(images)
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                stacked = np.stack([np.asarray(image) for image in shown])
                tracker.writer.add_images(name, stacked, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                import wandb

                named = [wandb.Image(image, caption=c) for image, c in zip(shown, captions, strict=True)]
                tracker.log({name: named}, step=step)

    def close(self) -> None:
        """Flushes the trackers."""
        # Not `end_training`, which also takes down the process group: that may wait for ranks that are gone.
        for tracker in self._accelerator.trackers:
            tracker.finish()
