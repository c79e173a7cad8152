"""Validation images: drawn while training, always from the same prompts and noise, and put side by side."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.pil_utils import make_image_grid
from PIL import Image, ImageDraw

from ..config.config import Config
from ..ensemble.ensemble import Ensemble
from ..families.base import Family, evaluating
from ..families.decoding import one_at_a_time
from ..families.prompts import EncodedPrompts, encode_prompts
from ..files import written_beside
from .compiling import uncompiled
from .tracking import Trackers

FOLDER = "validation"
BEFORE_AFTER = f"{FOLDER}/before_after.png"


class Validation:
    """The validation images of a run, on the main rank; on the others nothing is ever due or drawn.

    Args:
        config: the run's settings.
        family: the pipeline; images are drawn with its denoiser as it stands.
        trackers: which images are sent to.
        last_round: the number of the run's last round, which is always drawn.
        encoded: the prompts, as `encode_validation` has them.
        is_main: whether this is the main rank.
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        trackers: Trackers,
        last_round: int,
        encoded: EncodedPrompts | None,
        *,
        is_main: bool,
    ) -> None:
        self._config, self._family, self._trackers, self._encoded = config, family, trackers, encoded
        self._last_round, self._is_main = last_round, is_main
        self._output = config.output_path
        self._prompts = list(family.prompts(config.validation))

    def is_due(self, round_: int) -> bool:
        """Whether a round is to have images and has none yet."""
        every = self._config.validation.validation_rounds
        return (round_ % every == 0 or round_ == self._last_round) and self.is_missing(round_)

    def is_missing(self, round_: int) -> bool:
        """Whether there are images to be drawn of a round that has none."""
        return self._is_main and bool(self._prompts) and not self._file(round_).exists()

    def draw(self, round_: int, step: int) -> Path | None:
        """Draws the images of a round, unless they are there; round 0 is the pipeline before training.

        Args:
            step: steps of all clones together, for the trackers.

        Returns:
            their file, if they were drawn.
        """
        if not self.is_missing(round_):
            return None
        rows = self._images()
        save_image(grid(rows, self._prompts), self._file(round_))
        labelled = [(image, prompt) for row, prompt in zip(rows, self._prompts, strict=True) for image in row]
        self._trackers.log_images("validation", [i for i, _ in labelled], [p for _, p in labelled], step)
        return self._file(round_)

    def _images(self) -> list[list[Image.Image]]:
        """`num_validation_images` images of each prompt; torch's global generators are left alone."""
        with sampling(self._family, self._encoded) as pipeline:
            return [_row(self._config, self._family, pipeline, prompt) for prompt in self._prompts]

    def forget(self, above: int) -> None:
        """Removes the images of rounds later than `above`, and the comparison made with them."""
        if self._is_main:
            for file in (self._output / FOLDER).glob("round-*.png"):
                if int(file.stem.removeprefix("round-")) > above:
                    file.unlink()
            (self._output / BEFORE_AFTER).unlink(missing_ok=True)

    def before_after(self, round_: int) -> Path | None:
        """`validation/before_after.png`: the images of round 0 beside those of another one; None without them."""
        files = [self._file(0), self._file(round_)]
        if not all(file.is_file() for file in files):
            return None
        before, after = (Image.open(file).convert("RGB") for file in files)
        gap, band = 24, 20
        sheet = Image.new("RGB", (before.width + gap + after.width, max(before.height, after.height) + band), "white")
        pen = ImageDraw.Draw(sheet)
        titled = ((0, "before", before), (before.width + gap, f"after {round_} rounds", after))
        for x, title, image in titled:
            pen.text((x + 2, 4), title, fill="black")
            sheet.paste(image, (x, band))
        save_image(sheet, self._output / BEFORE_AFTER)
        return self._output / BEFORE_AFTER

    def _file(self, round_: int) -> Path:
        return self._output / FOLDER / f"round-{round_:04d}.png"


def encode_validation(config: Config, family: Family, device: torch.device) -> EncodedPrompts | None:
    """The prompts of the validation images, encoded as they will be drawn, while nothing else is on the device.

    Returns:
        None if there are none, or the pipeline must encode them while it draws.
    """
    prompts, pipeline = family.prompts(config.validation), family.sampling_pipeline()
    family.freeze()
    calls = [partial(_row, config, family, pipeline, prompt) for prompt in prompts]
    return encode_prompts(family, pipeline, calls, device)


def _row(config: Config, family: Family, pipeline: Any, prompt: str) -> list[Image.Image]:
    """The validation images of one prompt; image i starts from the noise of seed + i."""
    settings, first = config.validation, config.training.seed
    seeds = range(first, first + settings.num_validation_images)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return family.draw(pipeline, prompt, generators, settings, config.data.resolution)


@contextlib.contextmanager
def sampling(family: Family, prompts: EncodedPrompts | None = None) -> Iterator[Any]:
    """The pipeline as it stands, on the denoiser's device and without gradients, to draw with.

    Args:
        prompts: what it draws from, encoded already, for which the text encoders stay where they are; None: from any.
    """
    device = next(family.denoiser.parameters()).device
    encoders = family.caption_encoders if prompts is not None else ()
    # Idle models return to the host afterwards. A compiled denoiser would be compiled once more for this.
    with (
        family.lent([name for name in family.beside_denoiser if name not in encoders], device),
        evaluating(family.denoiser),
        torch.no_grad(),
        uncompiled(),
        one_at_a_time(family.pipeline, device),
    ):
        pipeline = family.sampling_pipeline()
        with contextlib.nullcontext() if prompts is None else prompts.answering(pipeline, encoders, device):
            yield pipeline.to(device)


@contextlib.contextmanager
def merged_pipeline(ensemble: Ensemble, family: Family) -> Iterator[Any]:
    """The same with the merged weights, or their moving average, for any prompts; only between rounds."""
    ensemble.load_result()
    with sampling(family) as pipeline:
        yield pipeline


def grid(rows: list[list[Image.Image]], labels: list[str]) -> Image.Image:
    """One row of images for each label, with the label above it; images without a label fill rows of eight."""
    if labels == [""]:
        (images,) = rows
        columns = min(8, len(images))
        blank = Image.new("RGB", images[0].size, "white")
        images = [*images, *[blank] * (-len(images) % columns)]
        return make_image_grid(images, len(images) // columns, columns)
    width, height = rows[0][0].size
    band = 16
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (max(columns * width, 160), len(rows) * (height + band)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        pen.text((2, y * (height + band) + 2), label, fill="black")
        sheet.paste(make_image_grid(row, 1, len(row)), (0, y * (height + band) + band))
    return sheet


def save_image(image: Image.Image, path: Path) -> None:
    """Writes a PNG beside its place and moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as partial:
        image.save(partial, format="PNG")
