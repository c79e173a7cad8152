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

KEYS = "keys"
_KEY_BYTES = 16
# A partial file older than this was left by a killed process.
_STALE_SECONDS = 24 * 3600
Row = dict[str, Tensor]


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
        self.folder = folder / hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES).hexdigest()
        self._made_from = made_from
        self.damaged: list[Path] = []
        self._files: list[Path] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        self._open: dict[int, Row] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        # Pickling would copy mapped tensors as a whole; keys are looked up before.
        return self.__dict__ | {"_open": {}, "_places": {}}

    def refresh(self) -> None:
        """Finds added files; unreadable ones count as absent, damaged ones are listed in `damaged`."""
        known = {*self._files, *self.damaged}
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
            for row, key in enumerate(keys):
                self._places.setdefault(key.tobytes(), (len(self._files), row))
            self._files.append(path)

    def missing(self, keys: Iterable[str]) -> list[int]:
        """Returns the positions of the keys without a row."""
        return [number for number, key in enumerate(keys) if _digest(key) not in self._places]

    def places(self, keys: Iterable[str]) -> np.ndarray:
        """Returns (n, 2) int32, where to `read` each of n keys; -1 for keys without a row."""
        found = [self._places.get(_digest(key), (-1, -1)) for key in keys]
        return np.array(found, dtype=np.int32).reshape(-1, 2)

    def read(self, place: Sequence[int]) -> Row:
        """Returns the row at one of the `places`: views of the file, not to be written to."""
        file, row = place
        if file not in self._open:
            self._open[int(file)] = self._mapped(int(file))
        return {name: tensor[row] for name, tensor in self._open[int(file)].items()}

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

    def add(self, keys: Sequence[str], rows: Mapping[str, Tensor]) -> None:
        """Writes a file with the rows of these keys; it has reached the disk before it gets its name.

        Args:
            rows: name -> tensor (len(keys), ...) on the host.

        Raises:
            OSError, SafetensorError: the file cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._describe()
        digests = np.frombuffer(b"".join(map(_digest, keys)), dtype=np.uint8).reshape(-1, _KEY_BYTES)
        # A unique name: another process may be writing the same rows.
        with written_beside(self.folder / f"{uuid.uuid4().hex}.safetensors") as partial:
            save_file({KEYS: torch.from_numpy(digests.copy()), **rows}, partial)
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


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=_KEY_BYTES).digest()
