"""A tiny world for a recipe of the paper, made without a network: images, a random network, and image features."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor, nn

from iet_finetune import Config
from iet_finetune.data.quiet import quiet_datasets
from iet_finetune.families.smoke import shrink

# MQ takes 50 training images at least.
TRAINING, HELD_OUT = 60, 20


class Mosaic(nn.Module):
    """Features that are the colours of 2 x 2 tiles."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 12) of (B, 3, H, W)."""
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def shrunk(config: Config, folder: Path) -> dict[str, Any]:
    """The flags that make a run of seconds of a recipe, as `--smoke` does, but on images that are kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    small, large = shrink(config, folder).to_flags(), config.to_flags()
    ours = ("output_dir", "holdout_fraction", "train_data_dir", "dataset_name")
    return {
        name: value for name, value in small.items() if value is not None and value != large[name] and name not in ours
    }


def save_table(folder: Path, config: Config, side: int) -> Path:
    """A data set with the recipe's columns and the splits `train` and `test`, as it could lie on the Hub."""
    data = config.data
    columns = {data.class_column, config.ensemble.shard_by_column} - {None}
    features = Features({data.image_column: ImageFeature(), **{c: ClassLabel(names=["one", "two"]) for c in columns}})
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pictures = _pictures(TRAINING + HELD_OUT, side)
    for split, part in (("train", pictures[:TRAINING]), ("test", pictures[TRAINING:])):
        rows = {data.image_column: part, **{column: [i % 2 for i in range(len(part))] for column in columns}}
        table = Dataset.from_dict(rows, features=features)
        with quiet_datasets():
            table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def save_folders(training: Path, held_out: Path | None, side: int) -> None:
    """A folder of captioned images, and another of held-out ones unless these are to be part of the first."""
    pictures = _pictures(TRAINING + HELD_OUT, side)
    first = len(pictures) if held_out is None else TRAINING
    for folder, part in ((training, pictures[:first]), (held_out, pictures[first:])):
        if folder is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for number, picture in enumerate(part):
            picture.save(folder / f"{number:03d}.png")
            rows.append(json.dumps({"file_name": f"{number:03d}.png", "text": f"picture {number}"}))
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def save_features(file: Path) -> Path:
    """A TorchScript file of image features, such as SSCD comes in."""
    with warnings.catch_warnings():
        # torch would rather have files of another kind.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Mosaic(), torch.zeros(1, 3, 288, 288)).save(str(file))
    return file


def _pictures(count: int, side: int) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(pixels) for pixels in rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)]
