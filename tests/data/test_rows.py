"""Rows on disk are read back as they were added, by any process, and a file is complete or absent."""

import hashlib
import multiprocessing
import os
import pickle
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from iet_finetune import UserError
from iet_finetune.data.rows import Places, Row, Rows, digests
from iet_finetune.files import partial_name

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MADE_FROM = {"model": "abc", "resolution": 16}
DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
]
HOURS = 3600


def rows_in(folder: Path) -> Rows:
    return Rows(folder, MADE_FROM)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same_bits(row: Row, expected: Row) -> None:
    assert row.keys() == expected.keys()
    for name, tensor in expected.items():
        assert row[name].dtype == tensor.dtype
        assert row[name].shape == tensor.shape
        assert bits(row[name]) == bits(tensor), name


def random_bits(generator: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of any bits at all, so that there are NaNs of all kinds among floats."""
    highest = 2 if dtype == torch.bool else 256
    size = int(np.prod(shape)) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    return torch.from_numpy(generator.integers(0, highest, size, dtype=np.uint8)).view(dtype).view(shape)


def numbered(count: int, first: int = 0) -> tuple[list[str], Row]:
    """Keys `first`, `first + 1`, ..., and rows that hold the number."""
    numbers = torch.arange(first, first + count)
    return [str(number) for number in numbers.tolist()], {"number": numbers}


def held(rows: Rows, keys: list[str]) -> list[int]:
    return [rows.read(place)["number"].item() for place in rows.places(keys)]


def file_of(rows: Rows) -> Path:
    (path,) = rows.folder.glob("*.safetensors")
    return path


@st.composite
def files_of_rows(draw: st.DrawFn) -> list[tuple[list[str], Row]]:
    """Several files' keys and rows: the same names everywhere, each tensor of any shape and type."""
    names = draw(st.lists(st.sampled_from(["mean", "std", "place", "text embeds", "größe"]), min_size=1, unique=True))
    kinds = {
        name: (tuple(draw(st.lists(st.integers(0, 5), max_size=3))), draw(st.sampled_from(DTYPES))) for name in names
    }
    keys = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=12, unique=True))
    ends = sorted(draw(st.sets(st.integers(1, len(keys)), max_size=3)) | {0, len(keys)})
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    return [
        (
            keys[start:end],
            {name: random_bits(generator, (end - start, *shape), dtype) for name, (shape, dtype) in kinds.items()},
        )
        for start, end in zip(ends, ends[1:], strict=False)
    ]


@given(files_of_rows(), st.booleans())
def test_what_is_added_is_read_back_bit_for_bit(tmp_path_factory, files, refreshed):
    folder = tmp_path_factory.mktemp("rows")
    rows = rows_in(folder)
    expected = {key: {name: tensor[i] for name, tensor in row.items()} for keys, row in files for i, key in
                enumerate(keys)}  # fmt: skip
    assert rows.missing(expected) == list(range(len(expected)))
    for keys, row in files:
        rows.add(keys, row)
    if refreshed:
        rows.refresh()
    else:
        rows = rows_in(folder)
    assert rows.missing(expected) == []
    for key, place in zip(expected, rows.places(expected), strict=True):
        assert_same_bits(rows.read(place), expected[key])


@settings(max_examples=30)
@given(st.sets(st.integers(0, 30), max_size=8), st.lists(st.integers(0, 30), max_size=20))
def test_keys_without_a_row_are_named_by_their_number_and_have_no_place(tmp_path_factory, there, asked):
    rows = rows_in(tmp_path_factory.mktemp("rows"))
    for number in there:
        rows.add(*numbered(1, number))
    rows.refresh()
    keys = [str(number) for number in asked]
    expected = [i for i, number in enumerate(asked) if number not in there]
    assert rows.missing(keys) == expected
    places = rows.places(keys)
    assert places.shape == (len(asked), 2)
    assert places.dtype == np.int32
    assert [i for i, place in enumerate(places.tolist()) if place == [-1, -1]] == expected
    assert [rows.read(place)["number"].item() for place in places if place[0] >= 0] == [n for n in asked if n in there]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 29), min_size=1, max_size=40))
def test_reading_many_at_once_gives_what_reading_one_at_a_time_gives(tmp_path_factory, asked):
    rows = rows_in(tmp_path_factory.mktemp("rows"))
    for start in (0, 10, 20):
        rows.add(*numbered(10, start))
    rows.refresh()
    places = rows.places([str(number) for number in asked])
    assert rows.read_all("number", places).tolist() == asked


@given(
    st.lists(st.tuples(st.sampled_from(["", "short ", "a " * 600, "b " * 600, "c" * 3000]), st.text()), max_size=20)
)
def test_keys_that_begin_alike_are_hashed_like_all_others(pairs):
    keys = [(before + after).encode("utf-8", "replace").decode() for before, after in pairs]
    expected = [hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys]
    assert [row.tobytes() for row in digests(keys)] == expected


def test_places_are_found_by_key_also_in_a_small_pickle(tmp_path):
    rows = rows_in(tmp_path)
    keys, row = numbered(1000)
    rows.add(keys, row)
    rows.refresh()
    names = digests(keys)
    pickled = pickle.dumps(Places(names, rows.places(names)))
    assert len(pickled) < 26_000
    places = pickle.loads(pickled)
    assert [rows.read(places[key])["number"].item() for key in ("7", "999", "0")] == [7, 999, 0]
    with pytest.raises(KeyError, match="1000"):
        places["1000"]


def test_a_key_that_is_added_twice_has_one_row(tmp_path):
    rows = rows_in(tmp_path)
    for _ in range(2):
        rows.add(*numbered(3))
    rows.refresh()
    assert len(list(rows.folder.glob("*.safetensors"))) == 2
    assert held(rows, ["2", "0", "1", "2"]) == [2, 0, 1, 2]


@pytest.mark.parametrize(
    "other",
    [{"model": "abd"}, {"resolution": 17}, {"resolution": "16"}, {"more": None}, {"model": {"abc": 1}}],
)
def test_rows_that_were_made_otherwise_lie_elsewhere(tmp_path, other):
    rows = rows_in(tmp_path)
    rows.add(*numbered(3))
    others = Rows(tmp_path, MADE_FROM | other)
    assert others.folder != rows.folder
    assert others.missing(["0", "1", "2"]) == [0, 1, 2]
    same = Rows(tmp_path, dict(reversed(MADE_FROM.items())))
    assert same.folder == rows.folder
    assert same.missing(["0", "1", "2"]) == []


def _read_elsewhere(rows: Rows, places: np.ndarray, answers: Any) -> None:
    answers.send([(row["number"].item(), bits(row["x"])) for row in map(rows.read, places)])


def test_another_process_reads_the_same_rows_from_a_pickle_that_holds_none_of_them(tmp_path):
    rows = rows_in(tmp_path)
    generator = np.random.default_rng(0)
    keys, numbers = numbered(400)
    values = random_bits(generator, (400, 2000), torch.float32)
    for start in (0, 100, 200, 300):
        part = slice(start, start + 100)
        rows.add(keys[part], {"number": numbers["number"][part], "x": values[part]})
    rows.refresh()
    asked = ["7", "399", "100", "99", "7"]
    places = rows.places(asked)
    expected = [(int(key), bits(values[int(key)])) for key in asked]
    assert [(row["number"].item(), bits(row["x"])) for row in map(rows.read, places)] == expected

    pickled = pickle.dumps(rows)
    assert len(pickled) < 4000, "four paths, and no rows or keys"
    copy = pickle.loads(pickled)
    assert [(row["number"].item(), bits(row["x"])) for row in map(copy.read, places)] == expected

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_read_elsewhere, args=(rows, places, theirs))
    process.start()
    assert ours.poll(60)
    assert ours.recv() == expected
    process.join()
    assert process.exitcode == 0


@linux
def test_reading_maps_files_and_takes_no_memory_of_its_own(tmp_path):
    rows = rows_in(tmp_path)
    keys, row = numbered(1000)
    values = torch.arange(1000, dtype=torch.float32)[:, None].expand(-1, 25_000)
    rows.add(keys, {**row, "x": values.contiguous()})
    rows.refresh()
    places = rows.places(keys)
    before = memory()
    assert sum(rows.read(place)["x"].sum().item() for place in places) == 25_000 * 999 * 500
    after = memory()
    # Pages of a file count as shared where the disk is memory itself.
    read = sum(after[kind] - before[kind] for kind in ("RssFile", "RssShmem"))
    assert read > 90_000, "all of 100 MB has been read"
    assert after["RssAnon"] - before["RssAnon"] < 5_000


def memory() -> dict[str, int]:
    """This process's memory in kB by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines) if name.startswith("Rss")}


@pytest.mark.parametrize("where", [0, 4, 20, 0.5, -1])
def test_a_truncated_file_counts_as_absent_is_listed_and_is_cleaned_away(tmp_path, where):
    rows = rows_in(tmp_path)
    rows.add(*numbered(50))
    whole = file_of(rows)
    data = whole.read_bytes()
    whole.write_bytes(data[: int(len(data) * where) if isinstance(where, float) else where])
    assert_damaged(rows_in(tmp_path), whole, [str(number) for number in range(50)])


@pytest.mark.parametrize("content", [b"\0" * 300, b"garbage", b"\xff" * 300, bytes(range(256)) * 20, None])
def test_a_file_of_something_else_counts_as_absent_is_listed_and_is_cleaned_away(tmp_path, content):
    rows = rows_in(tmp_path)
    rows.add(*numbered(5))
    path = file_of(rows)
    if content is None:  # what safetensors reads, and is not of ours
        save_file({"number": torch.arange(5)}, path)
    else:
        path.write_bytes(content)
    assert_damaged(rows_in(tmp_path), path, ["0", "4"])


def assert_damaged(rows: Rows, path: Path, keys: list[str]) -> None:
    good = numbered(1, 1000)
    rows.add(*good)
    rows.refresh()
    assert rows.damaged == [path]
    assert rows.missing([*keys, "1000"]) == list(range(len(keys)))
    assert held(rows, ["1000"]) == [1000]
    rows.refresh()
    assert rows.damaged == [path], "it is listed once"
    rows.clean()
    assert not path.exists()
    assert rows.damaged == []
    again = rows_in(rows.folder.parent)
    assert again.damaged == []
    assert held(again, ["1000"]) == [1000]


def test_what_cannot_be_opened_counts_as_absent_and_stays(tmp_path):
    rows = rows_in(tmp_path)
    rows.add(*numbered(5))
    file_of(rows).rename(rows.folder / "other.safetensors")
    # A folder cannot be mapped into memory, as no file can on some disks.
    (rows.folder / "folder.safetensors").mkdir()
    (rows.folder / "nowhere.safetensors").symlink_to(tmp_path / "gone")
    again = rows_in(tmp_path)
    assert again.missing(["0", "4", "7"]) == [2]
    assert held(again, ["4"]) == [4]
    assert again.damaged == []
    again.clean()
    assert (rows.folder / "folder.safetensors").is_dir()
    assert (rows.folder / "nowhere.safetensors").is_symlink()


def test_what_is_half_written_is_never_read_and_goes_when_it_is_old(tmp_path):
    rows = rows_in(tmp_path)
    rows.add(*numbered(5))
    whole = file_of(rows)
    old, young = (partial_name(whole.with_name(f"{name}.safetensors")) for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(whole.read_bytes())
    whole.unlink()
    os.utime(old, (time.time() - 25 * HOURS,) * 2)
    os.utime(young, (time.time() - 23 * HOURS,) * 2)
    again = rows_in(tmp_path)
    assert again.missing(["0", "4"]) == [0, 1]
    assert again.damaged == []
    again.clean()
    assert not old.exists()
    assert young.exists(), "another process may be writing it"


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, small_disk):
    disk = small_disk(1_000_000)
    rows = Rows(disk, MADE_FROM)
    rows.add(*numbered(10))
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    with pytest.raises(Exception, match="No space left"):
        rows.add(["large"], {"number": torch.zeros(1, 1_000_000)})
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before
    rows.refresh()
    assert held(rows, ["9"]) == [9]
    assert rows.damaged == []


def test_several_that_add_to_the_same_folder_at_the_same_time_all_keep_their_rows(tmp_path):
    together = threading.Barrier(4)

    def add(writer: int) -> None:
        rows = rows_in(tmp_path)
        for part in range(10):
            together.wait()
            # Some rows are those of a neighbour, too.
            rows.add(*numbered(8, 40 * writer + 4 * part))

    threads = [threading.Thread(target=add, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = rows_in(tmp_path)
    keys = [str(number) for number in range(164)]
    assert rows.missing(keys) == []
    assert held(rows, keys) == list(range(164))
    assert len(list(rows.folder.glob("*.safetensors"))) == 40
    assert not list(rows.folder.glob(".*.partial"))


def test_what_others_have_added_is_there_after_a_refresh_and_places_stay(tmp_path):
    rows, others = rows_in(tmp_path), rows_in(tmp_path)
    rows.add(*numbered(3))
    rows.refresh()
    places = rows.places(["0", "1", "2"])
    others.add(*numbered(3, 3))
    others.add(*numbered(2, 1))
    assert rows.missing(["1", "3"]) == [1]
    rows.refresh()
    assert np.array_equal(rows.places(["0", "1", "2"]), places)
    assert held(rows, ["0", "5", "3"]) == [0, 5, 3]


def test_a_file_that_is_gone_when_it_is_first_read_is_named_with_what_helps(tmp_path):
    rows = rows_in(tmp_path)
    rows.add(*numbered(3))
    rows.refresh()
    places = rows.places(["0"])
    path = file_of(rows)
    path.unlink()
    with pytest.raises(UserError, match="Start again to encode what is missing") as error:
        rows.read(places[0])
    assert f"`{path}`" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_removed_while_it_is_read_from_stays_readable(tmp_path):
    rows = rows_in(tmp_path)
    rows.add(*numbered(3))
    rows.refresh()
    places = rows.places(["0", "2"])
    assert rows.read(places[0])["number"] == 0
    file_of(rows).unlink()
    assert rows.read(places[1])["number"] == 2
