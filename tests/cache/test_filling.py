"""Filling a cache: ranks share the work, memory stays bounded, and encoded rows survive any error."""

import errno
import os
import shutil
import subprocess
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ranks import Ended, run_ranks
from safetensors import safe_open

from iet_finetune import UserError
from iet_finetune.cache import filling
from iet_finetune.cache.filling import complete
from iet_finetune.data.rows import Row, Rows
from iet_finetune.distributed.groups import Ranks

CHUNK = 4
MB = 1_000_000


class Numbers:
    """A source of rows that hold the number of their key; `encoded` are those that it has been asked for.

    Args:
        folder: of the cache.
        count: rows that are needed.
        width: numbers in a row, of four bytes.
        before: called with each number before it is encoded.
    """

    words = "numbers"

    def __init__(
        self, folder: Path, count: int, width: int = 8, before: Callable[[int], None] = lambda number: None
    ) -> None:
        self.rows = Rows(folder, {"width": width})
        self.encoded: list[int] = []
        self._keys = [str(number) for number in range(count)]
        self._width = width
        self._before = before

    def missing(self) -> list[int]:
        return self.rows.missing(self._keys)

    def encode(self, todo: list[int]) -> Iterator[tuple[list[str], Row]]:
        for start in range(0, len(todo), CHUNK):
            part = todo[start : start + CHUNK]
            for number in part:
                self._before(number)
            self.encoded += part
            yield [str(number) for number in part], {"x": torch.tensor(part)[:, None].repeat(1, self._width).int()}

    def values(self) -> list[int]:
        """What is kept for each key; -1 for nothing, and for a row that does not hold the same number throughout."""
        rows = [self.rows.read(place)["x"] if place[0] >= 0 else None for place in self.rows.places(self._keys)]
        return [int(row[0]) if row is not None and len(set(row.tolist())) == 1 else -1 for row in rows]


def fill(source: Numbers) -> Numbers:
    complete(source, Ranks.alone())
    return source


def stored(rows: Rows) -> list[int]:
    """How many rows each file holds."""
    found = []
    for path in rows.folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.append(len(file.get_tensor("keys")))
    return sorted(found)


def kept(source: Numbers) -> set[int]:
    return {number for number in source.values() if number >= 0}


def refusal(source: Numbers) -> str:
    with pytest.raises(UserError) as error:
        fill(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def test_every_row_is_encoded_once_and_another_run_encodes_none(tmp_path, capfd):
    source = fill(Numbers(tmp_path, 10))
    assert source.encoded == list(range(10))
    assert source.values() == list(range(10))
    assert stored(source.rows) == [10]
    assert capfd.readouterr().err.splitlines() == [f"encoding 10 numbers once, kept in {source.rows.folder}"]
    again = fill(Numbers(tmp_path, 10))
    assert again.encoded == []
    assert again.values() == list(range(10))
    assert capfd.readouterr() == ("", "")
    more = fill(Numbers(tmp_path, 13))
    assert more.encoded == [10, 11, 12]
    assert more.values() == list(range(13))


def test_no_more_is_held_in_memory_than_a_file_and_what_comes_at_once(tmp_path, monkeypatch):
    width, limit = 100, 20 * 400
    monkeypatch.setattr(filling, "FILE_BYTES", limit)
    alive: list[tuple[weakref.ref, int]] = []
    most = 0

    class Watched(Numbers):
        def encode(self, todo: list[int]) -> Iterator[tuple[list[str], Row]]:
            nonlocal most
            for keys, rows in super().encode(todo):
                alive.append((weakref.ref(rows["x"]), rows["x"].nbytes))
                most = max(most, sum(size for tensor, size in alive if tensor() is not None))
                yield keys, rows
                del rows

    source = fill(Watched(tmp_path, 103, width))
    assert source.values() == list(range(103))
    assert stored(source.rows) == [3, 20, 20, 20, 20, 20]
    assert most <= limit + CHUNK * width * 4


def test_a_file_is_written_when_enough_time_has_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(filling, "FILE_SECONDS", 0.05)
    source = Numbers(tmp_path, 12, before=lambda number: time.sleep(0.06 if number == 7 else 0))
    assert stored(fill(source).rows) == [4, 8]


@pytest.mark.parametrize(
    "error", [UserError("`010.png` cannot be decoded."), ValueError("a bug"), KeyboardInterrupt()]
)
def test_what_was_encoded_before_an_error_is_kept(tmp_path, error):
    def stop(number: int) -> None:
        if number == 10:
            raise error

    with pytest.raises(type(error)) as caught:
        fill(Numbers(tmp_path, 20, before=stop))
    assert caught.value is error
    rest = fill(Numbers(tmp_path, 20))
    assert rest.encoded == list(range(8, 20))
    assert rest.values() == list(range(20))


def test_a_damaged_file_is_removed_and_encoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(filling, "FILE_BYTES", 1)
    source = fill(Numbers(tmp_path, 12))
    number_of = {path: int(Rows.read(source.rows, (i, 0))["x"][0]) for i, path in enumerate(source.rows._files)}
    damaged = next(path for path, number in number_of.items() if number == 4)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = fill(Numbers(tmp_path, 12))
    assert again.encoded == [4, 5, 6, 7]
    assert again.values() == list(range(12))
    assert not damaged.exists()


def test_a_disk_that_maps_nothing_into_memory_is_refused(tmp_path, monkeypatch):
    def refuses(*of, **settings):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr("iet_finetune.data.rows.safe_open", refuses)
    assert "not map them into memory" in refusal(Numbers(tmp_path, 12))


def test_two_runs_that_fill_the_same_folder_at_the_same_time_both_end_with_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(filling, "FILE_BYTES", 1)
    sources = [Numbers(tmp_path, 40), Numbers(tmp_path, 50)]
    threads = [threading.Thread(target=fill, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [source.values() for source in sources] == [list(range(40)), list(range(50))]
    assert fill(Numbers(tmp_path, 50)).encoded == []


def test_a_disk_without_room_is_refused_before_more_than_a_chunk_is_encoded(small_disk):
    disk = small_disk(MB)
    source = Numbers(disk, 100, width=5000)
    line = refusal(source)
    assert line.startswith(f"no space left on the device for 100 encoded numbers in {source.rows.folder}: they take ")
    assert "take 0.01 GB, and 0.00 GB are free" in line
    assert line.endswith("with `--cache_dir`, or encode anew in every step with `--no_cache_latents`.")
    assert len(source.encoded) <= CHUNK


def test_what_fits_on_a_disk_but_not_twice_is_kept_on_it(small_disk, monkeypatch):
    monkeypatch.setattr(filling, "FILE_BYTES", 100_000)
    # Of 2 MB, the rows take 1.5: after the first few files less is free than all of them together take.
    source = fill(Numbers(small_disk(2 * MB), 75, width=5000))
    assert source.values() == list(range(75))


def test_a_disk_that_fills_up_ends_in_one_line_and_what_was_written_is_kept(small_disk, monkeypatch):
    monkeypatch.setattr(filling, "FILE_BYTES", 100_000)
    disk = small_disk(2 * MB)

    def others_write(number: int) -> None:
        if number == 30:
            (disk / "other").write_bytes(b"x" * (shutil.disk_usage(disk).free - 50_000))

    line = refusal(Numbers(disk, 60, width=5000, before=others_write))
    assert "no space left on the device" in line
    assert "--cache_dir" in line
    assert "--no_cache_latents" in line
    assert not list(disk.rglob(".*"))
    (disk / "other").unlink()
    rest = fill(Numbers(disk, 60, width=5000))
    assert 20 <= rest.encoded[0] <= 30
    assert rest.encoded == list(range(rest.encoded[0], 60))
    assert rest.values() == list(range(60))


def test_a_folder_that_cannot_be_written_ends_in_one_line_and_is_enough_where_nothing_is_missing(small_disk):
    disk = small_disk(MB)
    fill(Numbers(disk, 10))
    read_only(disk)
    source = Numbers(disk, 11)
    line = refusal(source)
    assert line == (
        f"encoded rows cannot be written to {source.rows.folder}: {os.strerror(errno.EROFS)}: choose a folder on "
        "another disk with `--cache_dir`, or encode anew in every step with `--no_cache_latents`."
    )
    assert source.encoded == [], "that is known before"
    assert fill(Numbers(disk, 10)).values() == list(range(10))


@pytest.mark.timeout(20)
def test_rows_that_do_not_come_back_from_the_disk_end_in_one_line_and_not_in_a_loop(tmp_path):
    # As on a disk that loses what is written, or cannot map it into memory.
    class Vanishing(Numbers):
        def encode(self, todo: list[int]) -> Iterator[tuple[list[str], Row]]:
            assert len(self.encoded) < 100, "it begins again and again"
            for keys, rows in super().encode(todo):
                yield [f"other {key}" for key in keys], rows

    assert "--no_cache_latents" in refusal(Vanishing(tmp_path, 5))


FILL = """
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from cache.test_filling import Numbers, filling
    filling.FILE_BYTES = {file_bytes}
    {before}
    source = Numbers(Path(os.environ["CACHE"]), {count}, before=before)
    try:
        filling.complete(source, ranks)
    finally:
        emit(source.encoded)
    emit(source.values())
"""


def body(count: int, before: str = "before = lambda number: None", file_bytes: int = 1 << 20) -> str:
    """Lines of ranks that fill the folder in $CACHE with so many numbers; each tells what it encoded, and the rows."""
    before = textwrap.indent(textwrap.dedent(before), "    ").strip()
    return FILL.format(tests=str(Path(__file__).parents[1]), count=count, before=before, file_bytes=file_bytes)


def caches(*folders: Path) -> dict[int, dict[str, str]]:
    return {rank: {"CACHE": str(folder)} for rank, folder in enumerate(folders)}


def assert_good(ended: list[Ended], count: int) -> list[list[int]]:
    """What each rank encoded, after a check that all have all rows."""
    assert [(end.code, end.said) for end in ended] == [(0, [])] * len(ended), ended
    assert all(end.output[1] == list(range(count)) for end in ended)
    return [end.output[0] for end in ended]


def test_ranks_that_see_the_same_folder_share_the_work(tmp_path):
    ended = run_ranks(body(22), 3, environments=caches(tmp_path, tmp_path, tmp_path))
    assert assert_good(ended, 22) == [list(range(7)), list(range(7, 14)), list(range(14, 22))]
    assert stored(Numbers(tmp_path, 22).rows) == [7, 7, 8]
    assert [end.stderr.count("encoding 22 numbers once") for end in ended] == [1, 0, 0]


def test_ranks_on_machines_with_folders_of_their_own_fill_each_of_them(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    fill(Numbers(there, 5))
    ended = run_ranks(body(11), 3, environments=caches(here, there, here))
    encoded = assert_good(ended, 11)
    assert encoded[1] == list(range(5, 11))
    assert encoded[0] + encoded[2] == list(range(11))


def test_ranks_of_which_some_have_nothing_to_do_end_with_everything(tmp_path):
    fill(Numbers(tmp_path, 10))
    ended = run_ranks(body(12), 3, environments=caches(*[tmp_path] * 3))
    assert sorted(sum(assert_good(ended, 12), [])) == [10, 11]


BAD_ON_ONE_RANK = """
    def before(number):
        if number == 6:  # of rank 0, and the other one is in the midst of its share
            time.sleep(0.5)
            raise UserError("`006.png` cannot be decoded.")
        if number >= 200:
            time.sleep(0.05)
"""


def test_an_error_on_one_rank_ends_all_with_its_line_and_each_keeps_what_it_had_encoded(tmp_path):
    ended = run_ranks(body(400, BAD_ON_ONE_RANK), 2, timeout=10, environments=caches(tmp_path, tmp_path))
    assert [end.code for end in ended] == [2, 2], ended
    assert [end.said for end in ended] == [["error: `006.png` cannot be decoded."], []], ended
    assert ended[0].output[0] == [0, 1, 2, 3]
    assert 0 < len(ended[1].output[0]) < 200, "the other rank does not go on to the end of its share"
    assert kept(Numbers(tmp_path, 400)) == {*ended[0].output[0], *ended[1].output[0]}


KILLED = """
    def before(number):
        if number == 11:
            die(signal.SIGKILL)
"""


def test_a_rank_that_is_killed_ends_all_and_costs_no_more_than_the_file_it_was_at(tmp_path):
    ended = run_ranks(body(20, KILLED, file_bytes=1), 2, timeout=3, environments=caches(tmp_path, tmp_path))
    assert ended[0].code != 0
    assert ended[1].code == -9
    (line,) = [line for end in ended for line in end.said]
    assert "rank 1 has not answered" in line
    assert kept(Numbers(tmp_path, 20)) == set(range(10))
    rest = fill(Numbers(tmp_path, 20))
    assert rest.encoded == list(range(10, 20))


def test_one_rank_that_cannot_write_ends_all_with_one_line(tmp_path):
    (tmp_path / "file").touch()
    ended = run_ranks(body(10), 2, environments=caches(tmp_path / "good", tmp_path / "file" / "bad"))
    assert [end.code for end in ended] == [2, 2]
    (line,) = [line for end in ended for line in end.said]
    assert f"encoded rows cannot be written to {tmp_path / 'file' / 'bad'}" in line
