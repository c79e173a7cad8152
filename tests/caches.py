"""Worlds of pipelines and images for tests of the cache, runs in them, and what a cache holds."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import RESOLUTION
from torch import Tensor

from iet_finetune import Config, Trainer
from iet_finetune.distributed.groups import Ranks
from iet_finetune.training.assembly import Run, assemble
from iet_finetune.training.data import Data
from iet_finetune.training.model import Model
from iet_finetune.training.starting import start_accelerator

MB = 1_000_000
LATEST = {"resume_from_checkpoint": "latest"}
# Width and height of the images of `mixed`: of five of them something is cut off.
SIZES = [(16, 16), (24, 16), (16, 40), (30, 20), (32, 32), (17, 33), (16, 16), (16, 16), (20, 44), (50, 50), (16, 16)]
CUT = 5
COPY_OF = {7: 6}  # a picture that is there twice, with captions of its own
MIXED, SQUARES = len(SIZES), 8
FLIPS, WORKERS, LONGER = {"random_flip": True}, {"dataloader_num_workers": 2}, {"num_train_epochs": 3}
CAPTIONS = {"caption_dropout": 0.3, "data": "mixed"}


def save_pictures(
    folder: Path, sizes: list[tuple[int, int]], captions: int = 1, copies: dict[int, int] | None = None
) -> Path:
    """Images of coloured noise, each with so many captions; the values of `copies` are those to copy."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    lines = []
    for i, (width, height) in enumerate(sizes):
        path = folder / f"{i:03d}.png"
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        if copies and i in copies:
            shutil.copy(folder / f"{copies[i]:03d}.png", path)
        texts = [f"thing {i}", *(f"thing {i}, said in way {j}" for j in range(1, captions))]
        lines.append({"file_name": path.name, "text": texts if captions > 1 else texts[0]})
    write_captions(folder, lines)
    return folder


def write_captions(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def captions_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def config(world: Path, output: Path, base: str = "sd", data: str = "squares", **flags: Any) -> Config:
    """A short run of two shards; the cache lies beside its output."""
    defaults: dict[str, Any] = {
        "pretrained_model_name_or_path": str(world / base),
        "train_data_dir": str(world / data),
        "output_dir": str(output),
        "cache_dir": str(output.parent / "cache"),
        "resolution": RESOLUTION,
        "num_shards": 2,
        "train_batch_size": 4,
        "num_train_epochs": 1,
        "merge_every_epochs": 1,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 0,
        "report_to": "none",
    }
    if base in ("sd3", "flux dev", "pixart alpha"):
        defaults["max_sequence_length"] = 16
    return Config.from_flags(**{**defaults, **flags})


def weights(output: Path) -> dict[str, Tensor]:
    (file,) = [*output.glob("unet/*.safetensors"), *output.glob("transformer/*.safetensors")]
    return load_file(file)


def train(settings: Config) -> dict[str, Tensor]:
    """The denoiser that comes of it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return weights(Trainer(settings).train())


def built(settings: Config) -> tuple[Data, Model, Run]:
    """What the run works with, for which everything has been encoded that is to be cached."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return assemble(settings, start_accelerator(settings), Ranks.alone())


def rows_of(path: Path) -> int:
    """How many rows a file of a cache holds."""
    with safe_open(path, framework="pt") as file:
        return file.get_slice("keys").get_shape()[0]


def has_images(path: Path) -> bool:
    """Whether the rows of a file of a cache are those of images."""
    with safe_open(path, framework="pt") as file:
        return "mean" in file.keys()  # noqa: SIM118 - no mapping


def encoded(cache: Path, pattern: str) -> list[Path]:
    """The files of a cache that belong to encoded images and captions."""
    return [*(cache / "iet_finetune" / "encoded").rglob(pattern)]


def rows(cache: Path) -> tuple[int, int]:
    """How many rows of images and of captions a cache holds, those counted twice that are there twice."""
    counts = {True: 0, False: 0}
    for path in encoded(cache, "*.safetensors"):
        counts[has_images(path)] += rows_of(path)
    return counts[True], counts[False]


def made_from(cache: Path) -> list[dict[str, Any]]:
    """What decided the bits of the rows of a cache: of those of images, and then of those of captions."""
    facts = [json.loads(path.read_text()) for path in encoded(cache, "made_from.json")]
    return sorted(facts, key=lambda one: "images" not in one)


def at_once(cache: Path) -> int:
    """How many images and captions were encoded at once for a cache."""
    (number,) = {facts["encoded at once"] for facts in made_from(cache)}
    return number


def encoded_by(settings: Config) -> tuple[int, int]:
    """How many images and captions are encoded when a run with these settings begins."""
    cache = Path(str(settings.model.cache_dir))
    before = rows(cache)
    built(settings)
    return tuple(now - then for now, then in zip(rows(cache), before, strict=True))  # type: ignore[return-value]


def amended(world: Path, folder: Path, what: str) -> str:
    """A copy of a pipeline or of the data under the same name in another folder, to be amended."""
    shutil.copytree(world / what, folder / what)
    return str(folder / what)
