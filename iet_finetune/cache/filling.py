"""Adds missing rows to a cache; all ranks that see the same folder share the work."""

import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from ..data.rows import Row, Rows
from ..distributed.groups import Ranks
from ..errors import UserError, disk_full, one_line
from ..files import gigabytes

# A file is written once it has this size or age, which is what a kill can cost.
FILE_BYTES, FILE_SECONDS = 128 << 20, 300.0
_INSTEAD = "choose a folder on another disk with `--cache_dir`, or encode anew in every step with `--no_cache_latents`"


class Source(Protocol):
    """Rows of one kind that a run needs, and how to produce missing ones.

    Attributes:
        words: what the rows encode, for messages.
        rows: where they are kept.
    """

    words: str
    rows: Rows

    def missing(self) -> list[Any]:
        """Returns the items without a row; ranks that share a folder agree."""

    def encode(self, todo: list[Any]) -> Iterator[tuple[list[str], Row]]:
        """Yields, in order, some keys at a time and their rows as tensors (len(keys), ...) on the host."""


def complete(source: Source, ranks: Ranks) -> None:
    """Adds all missing rows; every rank calls it and encodes a share.

    After an error, rows that were already encoded are kept.

    Raises:
        UserError: an item cannot be encoded, or the folder cannot be written or is full.
    """
    before = None
    while any(left := ranks.all_gather_object(len(source.missing()))):
        if left == before:
            raise UserError(
                f"cached files disappeared after writing to {source.rows.folder}: the filesystem may not keep them or "
                f"not map them into memory: {_INSTEAD}."
            )
        before = left
        together = _sharing(source.rows.folder, ranks)
        missing = source.missing()
        if ranks.is_main:
            # `images of 512 x 512` or `captions`: the first s is that of the plural.
            words = source.words if len(missing) != 1 else source.words.replace("s", "", 1)
            print(f"encoding {len(missing)} {words} once, kept in {source.rows.folder}", file=sys.stderr)
        if ranks.rank == together[0]:
            source.rows.clean()
        # Contiguous shares, so that an image and its mirrored copy are read once.
        ends = [len(missing) * number // len(together) for number in range(len(together) + 1)]
        place = together.index(ranks.rank)
        share = missing[ends[place] : ends[place + 1]]
        _Filler(source, len(missing), ranks).fill(share)
        ranks.barrier()
        source.rows.refresh()


def _sharing(folder: Path, ranks: Ranks) -> list[int]:
    """Returns the ranks, ascending, that share this rank's folder: they see each other's files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".partial") as probe:
            names = ranks.all_gather_object(Path(probe.name).name)
            seen = [name for name in names if (folder / name).exists()]
            views = ranks.all_gather_object(seen)
            ranks.barrier()
    except OSError as error:
        raise _not_written(folder, error) from None
    return [rank for rank, view in enumerate(views) if view == seen]


class _Filler:
    """Encodes this rank's share and writes it, one file at a time.

    Args:
        total: number of rows that all ranks together will write.
        ranks: rank 0 shows a progress bar, on terminals only.
    """

    def __init__(self, source: Source, total: int, ranks: Ranks) -> None:
        self._source = source
        self._total = total
        self._ranks = ranks
        self._room_is_known = False
        self._keys: list[str] = []
        self._rows: list[Row] = []
        self._bytes = 0
        self._since = time.monotonic()

    def fill(self, todo: list[Any]) -> None:
        """Encodes the items and writes their rows."""
        bar = tqdm(
            desc=f"encoding {self._source.words}",
            total=len(todo),
            disable=None if self._ranks.is_main else True,
            dynamic_ncols=True,
        )
        try:
            with bar:
                for keys, rows in self._source.encode(todo):
                    self._take(keys, rows)
                    bar.update(len(keys))
                    # A rank that ignores a failed peer is killed and would lose its rows.
                    self._ranks.check()
        except BaseException:
            with suppress(Exception):
                self._write()
            raise
        self._write()

    def _take(self, keys: list[str], rows: Row) -> None:
        size = sum(tensor.nbytes for tensor in rows.values())
        if not self._room_is_known:
            self._check_room(size // len(keys))
        self._keys += keys
        self._rows.append(rows)
        self._bytes += size
        if self._bytes >= FILE_BYTES or time.monotonic() - self._since > FILE_SECONDS:
            self._write()

    def _check_room(self, row_bytes: int) -> None:
        folder = self._source.rows.folder
        self._room_is_known = True  # later, rows take part of the free space
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise _not_written(folder, error) from None
        if (needed := row_bytes * self._total) > free:
            raise UserError(
                f"no space left on the device for {self._total} encoded {self._source.words} in {folder}: they take "
                f"{gigabytes(needed, math.ceil)}, and {gigabytes(free, math.floor)} are free: {_INSTEAD}."
            )

    def _write(self) -> None:
        if not self._keys:
            return
        rows = {name: torch.cat([part[name] for part in self._rows]) for name in self._rows[0]}
        try:
            self._source.rows.add(self._keys, rows)
        except (OSError, SafetensorError) as error:
            raise _not_written(self._source.rows.folder, error) from None
        self._keys, self._rows, self._bytes, self._since = [], [], 0, time.monotonic()


def _not_written(folder: Path, error: Exception) -> UserError:
    reason = disk_full(error) or getattr(error, "strerror", None) or one_line(error).rstrip(".")
    return UserError(f"encoded rows cannot be written to {folder}: {reason}: {_INSTEAD}.")
