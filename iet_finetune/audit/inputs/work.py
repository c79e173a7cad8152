"""Intermediate results on disk, by what they were computed from: an interrupted audit resumes."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ... import __version__
from ...files import written_beside

# Seconds of computing that an interruption may cost.
SAVE_EVERY = 10.0
_THREADS = 8
_BLOCK = 512  # images that wait for their turn at once


class Work:
    """A cache of arrays in one folder, by name and by their inputs.

    Args:
        folder: created when something is stored.
        silent: shows no progress bars; they are shown on terminals only.
    """

    def __init__(self, folder: Path, silent: bool = False) -> None:
        self._folder = folder
        self._silent = silent

    def rows(
        self,
        name: str,
        made_from: Mapping[str, Any],
        total: int,
        compute: Callable[[range], np.ndarray],
        batch: int,
    ) -> np.ndarray:
        """(total, ...) rows that `compute` returns for a range of row numbers, at most `batch` at a time.

        Rows of the same name and inputs are not computed again.

        Args:
            name: also what the progress bar says.
            made_from: everything the rows depend on, in types of JSON.
        """
        path = self._path(name, {**made_from, "total": total})
        if path.is_file():
            return np.load(path)
        partial = path.with_suffix(".begun.npy")
        done = [np.load(partial)] if partial.is_file() else []
        begun, since = sum(map(len, done)), time.monotonic()
        with self.progress(name, total, begun) as advance:
            for start in range(begun, total, batch):
                part = range(start, min(start + batch, total))
                done.append(compute(part))
                advance(len(part))
                if time.monotonic() - since > SAVE_EVERY:
                    done, since = [np.concatenate(done)], time.monotonic()
                    self._save(partial, done[0])
        rows = np.concatenate(done)
        self._save(path, rows)
        partial.unlink(missing_ok=True)
        return rows

    def array(
        self, name: str, made_from: Mapping[str, Any], make: Callable[[Callable[[int], None]], np.ndarray]
    ) -> np.ndarray:
        """An array computed at once; `make` receives a callback for its progress."""
        path = self._path(name, made_from)
        if not path.is_file():
            with self.progress(name, None) as advance:
                self._save(path, make(advance))
        return np.load(path)

    def filled(
        self, name: str, made_from: Mapping[str, Any], shape: tuple[int, ...], fill: Callable[[np.ndarray, int], None]
    ) -> np.ndarray:
        """A memory-mapped uint8 array; `fill` writes row i in place."""
        path = self._path(name, {**made_from, "shape": list(shape)})
        if not path.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            with written_beside(path) as partial, self.progress(name, shape[0]) as advance:
                array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
                with ThreadPoolExecutor(_THREADS) as pool:
                    for start in range(0, shape[0], _BLOCK):
                        block = range(start, min(start + _BLOCK, shape[0]))
                        for _ in pool.map(lambda row: fill(array[row], row), block):
                            advance(1)
                array.flush()
        return np.load(path, mmap_mode="r")

    @contextmanager
    def progress(self, words: str, total: int | None, begun: int = 0) -> Iterator[Callable[[int], None]]:
        """A progress bar on a terminal; yields the callback that advances it."""
        with tqdm(
            desc=words, total=total, initial=begun, disable=True if self._silent else None, dynamic_ncols=True
        ) as bar:

            def advance(count: int) -> None:
                bar.update(count)

            yield advance

    def _path(self, name: str, made_from: Mapping[str, Any]) -> Path:
        # Another version of this package may compute it differently.
        text = json.dumps({**made_from, "by": __version__}, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return self._folder / f"{name.replace(' ', '-')}-{digest}.npy"

    def _save(self, path: Path, rows: np.ndarray) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as partial, partial.open("wb") as stream:
            np.save(stream, rows, allow_pickle=False)
