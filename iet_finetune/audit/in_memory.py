"""The audit as a function: of a pipeline and images in memory, as a notebook has them."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from ..config.config import Config
from ..errors import UserError
from .flags import OF_THE_RUN, check_extra
from .inputs.pipelines import LoadedPipeline, kept_as_it_is
from .report.record import AuditRecord
from .request import AuditRequest, refuse_drawing
from .run import run_audit
from .sources import find_sources

# Flags that arguments of the function replace.
_FOLDERS = ("train_data_dir", "holdout_data_dir", "generated_dir")
_GIVEN = (
    *(*_FOLDERS, "dataset_name", "dataset_config_name", "dataset_split"),
    *("pretrained_model_name_or_path", "reference_model"),
)
Images: TypeAlias = str | os.PathLike[str] | Dataset | Sequence[Image.Image]


def audit(
    pipeline: Any,
    train_images: Images,
    heldout_images: Images | None = None,
    *,
    generated_images: Images | None = None,
    reference: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    silent: bool = False,
    **flags: Any,
) -> AuditRecord:
    """Measures how much a pipeline repeats its training images; the same numbers as `iet-finetune audit` gives.

    Images are a folder, with captions in its metadata file; a `datasets.Dataset` with the columns `image` and `text`;
    or a list of PIL images. Captions are needed if the pipeline draws from text.

    Args:
        pipeline: of diffusers, in fp32; None audits `generated_images` alone. It is handed back as it came.
        train_images: what it was trained on.
        heldout_images: real images of the same kind that it was not trained on, for the baselines.
        generated_images: its images, instead of drawing `num_images` of them.
        reference: a pipeline that was not trained on the images, such as the base; calibrates membership inference.
        output_dir: keeps the report, `audit.json` and the drawn images, and goes on with an interrupted audit.
        device: where to compute; that of the pipeline if not given.
        silent: without progress bars.
        flags: flags of the command, such as `num_images=200` or `features=["effnet_lite0"]`.

    Raises:
        UserError: the input is wrong; one line that says how to fix it.
    """
    check_extra()
    named = zip(_FOLDERS, (train_images, heldout_images, generated_images), strict=True)
    given = {name: _as_source(images) for name, images in named if images is not None}
    tables = {name: images for name, images in given.items() if isinstance(images, Dataset)}
    config = _config({name: images for name, images in given.items() if name not in tables}, flags)
    if generated_images is not None:
        refuse_drawing(flags)
    model, other = (None if each is None else LoadedPipeline(each, config) for each in (pipeline, reference))
    where = device or (pipeline.device if pipeline is not None else "cuda" if torch.cuda.is_available() else "cpu")
    with ExitStack() as stack:
        for each in (pipeline, reference):
            if each is not None:
                stack.enter_context(kept_as_it_is(each))
        folder = output_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="iet-audit-"))
        request = AuditRequest(config, None, None, False, False, "resolution" in flags, Path(folder), own=False)
        return run_audit(request, torch.device(where), None, silent, find_sources(request, model, other, tables))


def _config(folders: dict[str, Any], flags: dict[str, Any]) -> Config:
    for name in flags:
        if name not in (*OF_THE_RUN, "mixed_precision") or name in _GIVEN:
            raise UserError(f"`{name}` is no flag that `audit()` takes: leave it out.")
    return Config.from_flags(**folders, **flags)


def _as_source(images: Images) -> str | Dataset:
    """A folder, or a table; PIL images as files in a table, upright and without loss."""
    if isinstance(images, str | os.PathLike):
        return os.fspath(images)
    if isinstance(images, Dataset):
        return images.with_format(None)
    if isinstance(images, Image.Image) or not all(isinstance(image, Image.Image) for image in images):
        raise UserError("images must be a folder, a `datasets.Dataset`, or a list of PIL images.")
    # A copy forgets the file that an image was read from, whose pixels may no longer be those of the image.
    copies = [ImageOps.exif_transpose(image).copy() for image in images]
    return Dataset.from_dict({"image": copies}, features=Features({"image": ImageFeature()}))
