"""`run.html`: how a run goes, rewritten after every round, to be looked at while it trains."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..config.config import Config
from ..errors import UserError
from ..pages.page import embedded, render, write_page
from .assembly import Run
from .callbacks import Callback, ImagesFacts, RoundFacts, RunFacts
from .data import Data
from .reporting import METRICS
from .run_charts import charts, tiles
from .run_words import how_it_goes, in_words
from .suspects import Suspect, suspects
from .tracking import read_lines, tensorboard_command
from .validation import FOLDER

NAME = "run.html"
TEMPLATE = Path(__file__).with_name("run.html.jinja")
# How many images, and how many rounds' validation images, are shown at most; and the size of the latter in pixels.
MOST_SUSPECTS, MOST_ROUNDS, LARGEST = 12, 8, (640, 640)
# The time of so many rounds says how long the others will take.
LATEST = 5

Part = dict[str, Any]


class RunPage(Callback):
    """Writes the page of a run. Every rank has one, and that of the main rank alone writes.

    Args:
        doubt: why the skip rule can hardly act, if that is so.
    """

    def __init__(self, config: Config, data: Data, run: Run, doubt: str | None) -> None:
        self._config, self._data, self._run, self._doubt = config, data, run, doubt
        self._path = config.output_path / NAME
        self._suspects: list[Suspect] = []
        self._thumbnails: dict[int, Part | None] = {}
        self._embedded_files: dict[tuple[str, int], Part] = {}
        self._seconds: list[float] = []

    def on_run_begin(self, facts: RunFacts) -> None:
        """Writes the page of a run that is about to start, or to go on."""
        self._facts, self._round_began = facts, time.perf_counter()
        self._suspects = suspects(self._run, self._data, MOST_SUSPECTS)
        self._write()

    def on_round_end(self, facts: RoundFacts) -> None:
        """Asks all ranks for suspects, and writes the page."""
        now = time.perf_counter()
        self._seconds.append(now - self._round_began)
        self._round_began = now
        self._suspects = suspects(self._run, self._data, MOST_SUSPECTS)
        self._facts = replace(self._facts, step=facts.step, round=facts.round)
        self._write()

    def on_images(self, facts: ImagesFacts) -> None:
        """Writes the page with the new images."""
        self._write()

    def on_run_end(self, facts: RunFacts) -> None:
        """Writes the page of a run that is over."""
        self._write(over=True)

    def _write(self, over: bool = False) -> None:
        if not self._run.ranks.is_main:
            return
        lines, facts = read_lines(self._path.parent / METRICS), self._facts
        page = render(
            TEMPLATE,
            name=self._path.parent.name,
            facts=self._about(),
            headline=self._headline(over),
            sentences=list(self._sentences(lines, over)),
            tiles=tiles(lines, facts, None if over else self._seconds_left()),
            charts=list(charts(lines)),
            rounds=self._drawn(over),
            suspects=[(each, self._thumbnail(each.image), self._caption(each.image)) for each in self._suspects],
            names=self._data.images.names,
            tensorboard=tensorboard_command(self._config),
        )
        write_page(self._path, page)

    def _about(self) -> list[str]:
        data, shards = self._data, self._facts.num_shards
        about = [self._config.model.pretrained_model_name_or_path or "", f"{len(data.images):,} training images"]
        about += [f"{shards} shards"] if shards > 1 else []
        about += [f"{len(data.heldout):,} held out"] if len(data.heldout) else []
        return [words for words in about if words]

    def _headline(self, over: bool) -> str:
        facts = self._facts
        if over:
            return f"Finished after {facts.round} round{'s' * (facts.round != 1)}"
        if facts.round == 0:
            return f"Training begins: {facts.total_rounds} round{'s' * (facts.total_rounds != 1)}"
        return f"Round {facts.round} of {facts.total_rounds} is done"

    def _sentences(self, lines: Sequence[Part], over: bool) -> Iterator[str]:
        stops = self._config.training.stop_when == "auto"
        if over:
            best = self._run.stopping.best
            if best is not None:
                yield f"What is saved is round {best.round}, after which the held-out loss was lowest."
        elif (seconds := self._seconds_left()) is not None:
            yield f"About {in_words(seconds)} are left{', or less if it stops by itself' if stops else ''}."
        if lines:
            yield from how_it_goes(
                lines,
                self._facts.total_rounds,
                watches=self._run.stopping.watches,
                doubt=self._doubt,
            )

    def _seconds_left(self) -> float | None:
        """How long the remaining rounds will take, if they are as fast as the latest; None if that is not known."""
        latest = self._seconds[-LATEST:]
        left = self._facts.total_rounds - self._facts.round
        return left * sum(latest) / len(latest) if latest and left > 0 else None

    def _drawn(self, over: bool) -> list[Part]:
        """The validation images of some rounds, the first and the last among them, and that which is saved."""
        best = self._run.stopping.best if over else None
        files = sorted((self._path.parent / FOLDER).glob("round-*.png"))
        last = len(files) - 1
        chosen = sorted({round(last * place / (MOST_ROUNDS - 1)) for place in range(MOST_ROUNDS)} if files else ())
        rounds = [int(file.stem.removeprefix("round-")) for file in files]
        shown = []
        for place, (number, file) in enumerate(zip(rounds, files, strict=True)):
            saved = best is not None and number == best.round
            if place in chosen or saved:
                title = f"after round {number}" if number else "before training"
                shown.append({"title": f"{title}, saved" if saved else title, "image": self._embedded(file)})
        return shown

    def _embedded(self, file: Path) -> Part:
        """The validation images of a round, made ready once."""
        version = (file.name, file.stat().st_mtime_ns)
        if version not in self._embedded_files:
            with Image.open(file) as image:
                self._embedded_files[version] = embedded(image, LARGEST)
        return self._embedded_files[version]

    def _thumbnail(self, image: int) -> Part | None:
        """The training image, or None if its file is there no more."""
        if image not in self._thumbnails:
            try:
                self._thumbnails[image] = embedded(self._data.images.load(image))
            except UserError:
                self._thumbnails[image] = None
        return self._thumbnails[image]

    def _caption(self, image: int) -> str:
        captions = self._data.images.captions[image]
        return captions[0] if captions else ""
