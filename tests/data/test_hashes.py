"""A start reads only images that have changed since an earlier one, and no change goes unnoticed."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from data.made import load_all, refusal, table, write_rows
from safetensors.torch import save_file

from iet_finetune.data import hashes

COUNT, SIDE = 6, 64
IO = Path("/proc/self/io")


def noise(number: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8))


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Images count as settled at once, so that no test has to wait for it."""
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 0.0)


@pytest.fixture
def folder(tmp_path):
    """Images of 12 kB each, uncompressed and so of one size, with captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(COUNT):
        noise(number).save(folder / f"{number}.bmp")
    write_rows(folder / "metadata.jsonl", [{"file_name": f"{i}.bmp", "text": f"caption {i}"} for i in range(COUNT)])
    return folder


def bytes_read() -> int:
    """How many bytes this process has read from files so far."""
    if not IO.exists():
        pytest.skip("only Linux counts what a process reads")
    return int(IO.read_text().split("rchar: ")[1].split()[0])


def reading(**flags):
    """The loaded images, and how many images' bytes were read for them, about."""
    before = bytes_read()
    images = load_all(**flags)
    return images, round((bytes_read() - before) / (SIDE * SIDE * 3))


def sources(folder: Path, kind: str) -> dict[str, str]:
    """The flags of one of the ways to give the images of `folder`."""
    if kind == "folder":
        return {"folder": str(folder)}
    named = folder.parent / "named"
    named.mkdir()
    paths = [str(folder / f"{number}.bmp") for number in range(COUNT)]
    if kind == "paths":
        write_rows(named / "rows.jsonl", [{"image": path, "text": "a caption"} for path in paths])
    else:
        table(COUNT, image=[Path(path).read_bytes() for path in paths]).to_parquet(named / "a.parquet")
    return {"dataset_name": str(named)}


@pytest.mark.parametrize("kind", ["folder", "paths", "bytes"])
def test_a_second_start_reads_no_image_and_finds_the_same_hashes(folder, tmp_path, kind):
    flags = {**sources(folder, kind), "cache_dir": str(tmp_path / "cache")}
    load_all(**{**flags, "cache_dir": str(tmp_path / "other")})  # imports what loading needs
    first, read = reading(**flags)
    assert read >= COUNT
    second, read = reading(**flags)
    assert read <= 1, "metadata and hashes alone"
    assert second.content_hashes == first.content_hashes
    assert second.fingerprint == first.fingerprint


def test_only_what_was_added_or_changed_is_read(folder, tmp_path):
    flags = {"folder": str(folder), "cache_dir": str(tmp_path / "cache")}
    before = load_all(**flags).content_hashes
    stat = (folder / "2.bmp").stat()
    noise(77).save(folder / "2.bmp")
    os.utime(folder / "2.bmp", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (folder / "2.bmp").stat().st_size == stat.st_size, "neither its size nor its time stamp tells"
    after, read = reading(**flags)
    assert 1 <= read <= 2
    assert [i for i in range(COUNT) if after.content_hashes[i] != before[i]] == [2]
    assert after.content_hashes[2] == hashes.content_hash((folder / "2.bmp").read_bytes())


@pytest.mark.parametrize("kind", ["paths", "bytes"])
def test_a_change_in_a_table_is_noticed(folder, tmp_path, kind):
    flags = {**sources(folder, kind), "cache_dir": str(tmp_path / "cache")}
    before = load_all(**flags).content_hashes
    if kind == "paths":
        noise(77).save(folder / "2.bmp")
    else:
        rows = [(folder / f"{number}.bmp").read_bytes() for number in (0, 1, 5, 3, 4, 5)]
        table(COUNT, image=rows).to_parquet(tmp_path / "named" / "a.parquet")
    after = load_all(**flags).content_hashes
    assert [i for i in range(COUNT) if after[i] != before[i]] == [2]


def test_hashes_that_an_earlier_version_kept_are_found(folder, tmp_path):
    paths = [str(folder / f"{number}.bmp") for number in range(COUNT)]
    stamps = [hashes.file_stamp(path) for path in paths]
    made_from = json.dumps({"Pillow": PIL.__version__, "source": hashes.content_hash(str(folder).encode())})
    name = hashlib.blake2b(made_from.encode(), digest_size=16).hexdigest()
    kept = tmp_path / "cache" / "iet_finetune" / "data" / "hashes" / name
    kept.mkdir(parents=True)
    # Each hash is the number of the image.
    tensors = {
        "keys": torch.tensor([list(hashlib.blake2b(stamp.encode(), digest_size=16).digest()) for stamp in stamps]),
        "hash": torch.arange(COUNT)[:, None].expand(-1, 16),
    }
    tensors = {key: value.to(torch.uint8).contiguous() for key, value in tensors.items()}
    save_file(tensors, kept / "0123456789abcdef.safetensors")
    found = load_all(folder=str(folder), cache_dir=str(tmp_path / "cache")).content_hashes
    assert found == tuple(f"{number:02x}" * 16 for number in range(COUNT))


def test_an_image_that_has_broken_since_is_refused(folder, tmp_path):
    flags = {"folder": str(folder), "cache_dir": str(tmp_path / "cache")}
    load_all(**flags)
    (folder / "3.bmp").write_bytes(b"x" * (folder / "3.bmp").stat().st_size)
    assert f"`{folder / '3.bmp'}` is not an image that Pillow can read" in refusal(**flags)


def test_a_file_that_may_change_within_its_time_stamp_is_not_remembered(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 3600.0)
    flags = {"folder": str(folder), "cache_dir": str(tmp_path / "cache")}
    load_all(**flags)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_cache_that_cannot_be_written_costs_only_time(folder, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    flags = {"folder": str(folder), "cache_dir": str(tmp_path / "cache")}
    assert load_all(**flags).content_hashes == load_all(**flags).content_hashes
