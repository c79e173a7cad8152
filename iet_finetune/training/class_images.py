"""The class images of prior preservation: those of a folder, and those that the base model draws into it."""

import contextlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..config.config import Config
from ..config.settings import ValidationConfig
from ..data.dataset import TrainingImages, load_folder
from ..data.files import find_files, sorted_files
from ..distributed.groups import Ranks
from ..errors import UserError, one_line
from ..families import Family
from ..families.precision import HALF, predicting
from ..families.prompts import encode_prompts
from ..files import no_space_named, written_beside
from ..method.seeding import class_image_seed
from .validation import sampling

# Drawn at once, always as many: the last bits of an image may depend on that.
AT_ONCE = 4
# How the images of a folder were drawn; hidden, as it is no image.
SETTINGS = ".drawn.json"
_DRAWN = re.compile(r"drawn-(\d{6})\.png")


@dataclass(frozen=True)
class ClassImages:
    """Images of the class.

    Attributes:
        images: all of them, with their captions.
        drawn: how many of them the base model drew.
    """

    images: TrainingImages
    drawn: int

    @property
    def words(self) -> str:
        """How many there are, and where they come from."""
        given = len(self.images) - self.drawn
        parts = [f"{given} given"] * (given > 0) + [f"{self.drawn} drawn from the base model"] * (self.drawn > 0)
        return f"{len(self.images)}, {' and '.join(parts)}; one is trained beside each training image"


def find_class_images(config: Config, family: Family, ranks: Ranks, accelerator: Accelerator) -> ClassImages | None:
    """The class images of the run, of which missing ones are drawn first; None without prior preservation.

    Every rank takes part, and draws a share of them. Image number i follows from the seed, i and what `.drawn.json`
    says alone, however many ranks there are and wherever an earlier start was stopped.

    Args:
        family: the base model, on the host.

    Raises:
        UserError: the folder cannot be used, holds images drawn in another way, or is not the same for all ranks.
    """
    if not config.prior.is_on:
        return None
    _check_apart(config)
    # Before any of them is drawn: the ranks must agree.
    numbers = ranks.all_gather_object(missing(config))[0]
    if numbers:
        if ranks.is_main:
            _claim(config, family, accelerator.mixed_precision)
            print(f"drawing {len(numbers)} class images into {config.class_path}", file=sys.stderr)
        ranks.barrier()
        _draw_share(config, family, ranks, accelerator, numbers)
        ranks.barrier()
        if left := missing(config):
            raise UserError(
                f"`--class_data_dir {config.class_path}` does not have the class image {_file(config, left[0]).name}, "
                "which a rank has drawn: choose a folder on storage that all machines share."
            )
    with ranks.first_on_machine():
        return _load(config)


def missing(config: Config) -> list[int]:
    """The numbers of the class images that are still to be drawn."""
    own, drawn = _images(config.class_path)
    wanted = range(max(config.prior.num_class_images - own, 0))
    return [number for number in wanted if number not in drawn]


def _images(folder: Path) -> tuple[int, set[int]]:
    """How many images of a folder were not drawn here, and the numbers of those that were."""
    names = [Path(path).name for path in sorted_files(find_files(str(folder))).images] if folder.is_dir() else []
    found = [_DRAWN.fullmatch(name) for name in names]
    return found.count(None), {int(match[1]) for match in found if match is not None}


def _check_apart(config: Config) -> None:
    """Raises a `UserError` if class images would be training images too."""
    data = config.data.train_data_dir
    if data is None:
        return
    ours, theirs = config.class_path.resolve(), Path(data).resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise UserError(
            f"the folder of class images `{config.class_path}` and `--train_data_dir {data}` lie in each other, so "
            "that the same images would be in both: give another `--class_data_dir`."
        )


def _claim(config: Config, family: Family, precision: str) -> None:
    """Makes the folder, and notes how its images are drawn, or checks that earlier ones were drawn in the same way.

    Raises:
        UserError: they were not, or the folder cannot be made or written.
    """
    folder = config.class_path
    settings = {
        "prompt": config.prior.class_prompt,
        "seed": config.training.seed,
        "resolution": config.data.resolution,
        "steps": _steps(family),
        "precision": precision,
        "base model": family.fingerprint(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder of class images `{folder}` cannot be made: {error.strerror or one_line(error)}. Choose "
            "another `--class_data_dir`."
        ) from None
    try:
        before = json.loads((folder / SETTINGS).read_text(encoding="utf-8")) if _images(folder)[1] else settings
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"`--class_data_dir {folder}` holds class images that were drawn with another {name}: remove "
                    "them, or choose another folder."
                )
        with no_space_named(folder), written_beside(folder / SETTINGS) as partial:
            partial.write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf-8")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"`--class_data_dir {folder}`: {SETTINGS} cannot be read or written there: {one_line(error).rstrip('.')}. "
            "Remove the images drawn there, or choose another folder."
        ) from None


def _steps(family: Family) -> int:
    """As many denoising steps as the pipeline takes unless it is told otherwise."""
    default = inspect.signature(type(family.pipeline).__call__).parameters["num_inference_steps"].default
    # A scheduler that begins one step later, as Stable Diffusion's, cannot take all of them.
    return min(default, max(len(family.objective) - 1, 1))


def _draw_share(config: Config, family: Family, ranks: Ranks, accelerator: Accelerator, numbers: list[int]) -> None:
    """Draws this rank's share of the images, and writes each as soon as it is there."""
    chunks = sorted({number // AT_ONCE for number in numbers})[ranks.rank :: ranks.size]
    settings = ValidationConfig(validation_inference_steps=_steps(family))
    prompt, seed, size = str(config.prior.class_prompt), config.training.seed, config.data.resolution
    bar = tqdm(chunks, desc="drawing class images", disable=None if ranks.is_main else True, dynamic_ncols=True)

    def draw(pipeline: Any, together: range) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(class_image_seed(seed, number)) for number in together]
        return family.draw(pipeline, prompt, generators, settings, size)

    with _ready(family, accelerator, draw) if chunks else contextlib.nullcontext() as pipeline:
        for chunk in bar:
            together = range(chunk * AT_ONCE, (chunk + 1) * AT_ONCE)
            images = draw(pipeline, together)
            for number, image in zip(together, images, strict=True):
                if number in numbers:
                    with no_space_named(config.class_path), written_beside(_file(config, number)) as partial:
                        image.save(partial, format="PNG")
            # A rank that ignores a failed peer is killed.
            ranks.check()


@contextlib.contextmanager
def _ready(family: Family, accelerator: Accelerator, draw: Callable[[Any, range], list[Image.Image]]) -> Iterator[Any]:
    """The pipeline as it came, to draw with, on the device meanwhile.

    Args:
        draw: draws the images of some numbers, always from the same prompt, which is encoded first.
    """
    device, half = accelerator.device, HALF.get(accelerator.mixed_precision)
    on_host = device.type == "cpu"
    family.freeze()
    with torch.autocast(device.type, dtype=half, enabled=half is not None and on_host):
        pipeline = family.sampling_pipeline()
        prompts = encode_prompts(family, pipeline, [partial(draw, pipeline, range(AT_ONCE))], device)
        with (
            predicting(family.denoiser, device, None if on_host else half),
            sampling(family, prompts) as pipeline,
        ):
            yield pipeline


def _file(config: Config, number: int) -> Path:
    return config.class_path / f"drawn-{number:06d}.png"


def _load(config: Config) -> ClassImages:
    own, drawn = _images(config.class_path)
    if not own and not drawn:
        raise UserError(
            f"`--class_data_dir {config.class_path}` holds no images, and `--num_class_images 0` draws none: add "
            "some, or leave that out."
        )
    data = replace(config.data, default_caption=config.prior.class_prompt, instance_prompt=None, class_column=None)
    folder, cache_dir = str(config.class_path), config.model.cache_dir
    images = load_folder("class_data_dir", folder, data, captions=True, cache_dir=cache_dir)
    return ClassImages(images, len(drawn))
