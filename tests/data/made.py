"""Folders of small images, and how tests load them."""

import io
import json

import datasets
import PIL.Image
import pytest

from iet_finetune.config.settings import DataConfig
from iet_finetune.data.dataset import load_images
from iet_finetune.errors import UserError


def png(number):
    """A small image that differs for every number below 2**24."""
    colour = (number & 255, number >> 8 & 255, number >> 16 & 255)
    file = io.BytesIO()
    PIL.Image.new("RGB", (10, 12), colour).save(file, "PNG")
    return file.getvalue()


def write_folder(folder, files, rows=None, metadata="metadata.jsonl"):
    """Image files (name -> number of the image) and, if given, metadata rows."""
    for name, number in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))
    if rows is not None:
        write_rows(folder / metadata, rows)
    return folder


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def simple_folder(folder, count=6, numbers=None):
    names = [f"{i:03}.png" for i in range(count)]
    rows = [{"file_name": name, "text": f"caption {i}"} for i, name in enumerate(names)]
    return write_folder(folder, dict(zip(names, numbers or range(count), strict=True)), rows)


def load(folder=None, *, seed=0, shard_by_column=None, needs_captions=True, cache_dir=None, **flags):
    data = DataConfig(**({} if folder is None else {"train_data_dir": str(folder)}), **flags)
    return load_images(
        data, cache_dir=cache_dir, seed=seed, shard_by_column=shard_by_column, needs_captions=needs_captions
    )


def load_all(*args, **options):
    training, held_out = load(*args, **options)
    assert len(held_out) == 0
    return training


def refusal(*args, **options):
    with pytest.raises(UserError) as caught:
        load(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table(count=5, **columns):
    columns = {"image": [png(i) for i in range(count)], "text": [f"caption {i}" for i in range(count)], **columns}
    return datasets.Dataset.from_dict(columns)
