"""Rows of tensors on disk by key: memory-mapped files, complete or absent, that runs share."""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError, one_line
from ..files import to_disk, written_beside
from .columnar import DIGEST_BYTES, keys_of

KEYS = "keys"
# Keys that share a longer beginning are hashed from where they differ: those of a table's rows name all its files.
_LONG = 1024
# A partial file older than this was left by a killed process.
_STALE_SECONDS = 24 * 3600
Row = dict[str, Tensor]
# Text keys, or their digests as `digests` returns them.
Keys = Iterable[str] | np.ndarray


class Places:
    """Where rows are, by their keys, in two arrays; picklable.

    Args:
        keys: (n, 16) uint8, of `digests`; of equal ones the first counts.
        places: (n, 2) int32, file and row; -1 where there is none.
    """

    def __init__(self, keys: np.ndarray, places: np.ndarray) -> None:
        self._keys, firsts = np.unique(keys_of(keys), return_index=True)
        self._places = places[firsts]

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        """Returns (n, 2) int32, the places of keys (n, 16) uint8; -1 for unknown ones."""
        asked = keys_of(keys)
        found = np.full((len(asked), 2), -1, dtype=np.int32)
        if len(asked) and len(self._keys):
            # In sorted order, or a search would hardly find in the processor's cache what the last one left there.
            order = np.argsort(asked)
            nearest = np.searchsorted(self._keys, asked[order]).clip(max=len(self._keys) - 1)
            there = self._keys[nearest] == asked[order]
            found[order[there]] = self._places[nearest[there]]
        return found

    def __getitem__(self, key: str) -> tuple[int, int]:
        """Returns the place of one text key; raises a `KeyError` if there is none."""
        file, row = self(digests([key]))[0].tolist()
        if file < 0:
            raise KeyError(key)
        return file, row

    def joined(self, others: "Sequence[Places]") -> "Places":
        """These places and others."""
        everything = [self, *others]
        keys = np.concatenate([each._keys for each in everything])
        return Places(keys.view(np.uint8).reshape(-1, DIGEST_BYTES), np.concatenate([e._places for e in everything]))

    @staticmethod
    def nothing() -> "Places":
        """No places."""
        return Places(np.empty((0, DIGEST_BYTES), np.uint8), np.empty((0, 2), np.int32))


class Rows:
    """Rows of named tensors by text key, all produced in the same way.

    A file holds many rows and never changes. Runs that need the same rows share the files, and each adds files with
    the missing rows. Only the files' paths are pickled; every process maps the files when it first reads.

    Args:
        folder: holds one sub-folder per way of producing rows.
        made_from: everything besides the key that determines a row, in JSON types.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any]) -> None:
        text = json.dumps(made_from, sort_keys=True)
        self.folder = folder / hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()
        self._made_from = made_from
        self.damaged: list[Path] = []
        self._files: list[Path] = []
        self._places = Places.nothing()
        self._open: dict[int, Row] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        # Pickling would copy mapped tensors as a whole; keys are looked up before.
        return self.__dict__ | {"_open": {}, "_places": Places.nothing()}

    def refresh(self) -> None:
        """Finds added files; unreadable ones count as absent, damaged ones are listed in `damaged`."""
        known, added = {*self._files, *self.damaged}, []
        for path in sorted(set(self.folder.glob("*.safetensors")) - known):
            try:
                with safe_open(path, framework="pt") as file:
                    keys = file.get_tensor(KEYS).numpy()
            except OSError:
                # Gone by now, another user's, or on a disk without memory mapping: no reason to remove it.
                continue
            except SafetensorError:
                self.damaged.append(path)
                continue
            rows = np.arange(len(keys), dtype=np.int32)
            added.append(Places(keys, np.stack([np.full_like(rows, len(self._files)), rows], axis=1)))
            self._files.append(path)
        if added:
            self._places = self._places.joined(added)

    def missing(self, keys: Keys) -> list[int]:
        """Returns the positions of the keys without a row."""
        return np.flatnonzero(self.places(keys)[:, 0] < 0).tolist()

    def places(self, keys: Keys) -> np.ndarray:
        """Returns (n, 2) int32, where to `read` each of n keys; -1 for keys without a row."""
        return self._places(keys if isinstance(keys, np.ndarray) else digests(keys))

    def read(self, place: Sequence[int]) -> Row:
        """Returns the row at one of the `places`: views of the file, not to be written to."""
        file, row = place
        return {name: tensor[row] for name, tensor in self._file(int(file)).items()}

    def read_all(self, name: str, places: np.ndarray) -> Tensor:
        """Returns (n, ...), a copy of one of the tensors of the rows at n `places`, of which there is at least one."""
        order = np.argsort(places[:, 0], kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(places[order, 0])) + 1)
        tensors = [self._file(int(places[part[0], 0]))[name][torch.from_numpy(places[part, 1])] for part in parts]
        return torch.cat(tensors)[torch.from_numpy(np.argsort(order))]

    def _file(self, number: int) -> Row:
        if number not in self._open:
            self._open[number] = self._mapped(number)
        return self._open[number]

    def _mapped(self, number: int) -> Row:
        path = self._files[number]
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name != KEYS}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"`{path}`, a file of encoded rows, can no longer be read: {one_line(error).rstrip('.')}. "
                "Start again to encode what is missing."
            ) from None

    def add(self, keys: Keys, rows: Mapping[str, Tensor]) -> None:
        """Writes a file with the rows of these keys; it has reached the disk before it gets its name.

        Args:
            rows: name -> tensor (len(keys), ...) on the host.

        Raises:
            OSError, SafetensorError: the file cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._describe()
        names = keys if isinstance(keys, np.ndarray) else digests(keys)
        # A unique name: another process may be writing the same rows.
        with written_beside(self.folder / f"{uuid.uuid4().hex}.safetensors") as partial:
            save_file({KEYS: torch.from_numpy(names), **rows}, partial)
            to_disk(partial)

    def _describe(self) -> None:
        """Writes `made_from` into the folder for people to read; no code reads it."""
        path = self.folder / "made_from.json"
        if not path.exists():
            partial = self.folder / f".{uuid.uuid4().hex}.partial"
            partial.write_text(json.dumps(self._made_from, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)

    def clean(self) -> None:
        """Removes damaged files and partial files left by killed processes."""
        for path in self.damaged:
            path.unlink(missing_ok=True)
        self.damaged.clear()
        for partial in self.folder.glob(".*.partial"):
            with suppress(OSError):
                if time.time() - os.stat(partial).st_mtime > _STALE_SECONDS:
                    partial.unlink()


def digests(keys: Iterable[str]) -> np.ndarray:
    """(n, 16) uint8, what stands for n keys in the files."""
    found, shared, begun = bytearray(), "", hashlib.blake2b(digest_size=DIGEST_BYTES)
    for key in keys:
        end = key.rfind(" ") + 1
        if end < _LONG:
            found += hashlib.blake2b(key.encode(), digest_size=DIGEST_BYTES).digest()
            continue
        if key[:end] != shared:
            shared = key[:end]
            begun = hashlib.blake2b(shared.encode(), digest_size=DIGEST_BYTES)
        one = begun.copy()
        one.update(key[end:].encode())
        found += one.digest()
    return np.frombuffer(found, dtype=np.uint8).reshape(-1, DIGEST_BYTES)
