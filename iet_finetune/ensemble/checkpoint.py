"""Checkpoints that are complete or absent: written beside their place, renamed last, checked before they are used."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..distributed.groups import Ranks
from ..errors import UserError, one_line
from ..files import (
    MANIFEST,
    checkpoint_step,
    complete_checkpoints,
    no_space_named,
    partial_name,
    remove_folder,
    removed_on_error,
    replaced_folder,
    to_disk,
)
from .pieces import Piece

PART = "part-{:05d}.json"
_FORMAT = 1
_GIVEN_UP = ".given-up"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a piece."""
        return name in self.manifest["pieces"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The named tensors of a piece, on the host; a `UserError` where it is damaged."""
        with self._damage_named(name):
            return load_file(self.path / name)

    def state(self, name: str) -> Any:
        """The state of a piece, on the host; a `UserError` where it is damaged."""
        with self._damage_named(name):
            return torch.load(self.path / name, map_location="cpu", weights_only=True)

    def read_slice(self, prefix: str, start: int, out: Tensor) -> None:
        """Fills `out` (n,) with the numbers from `start` on of a vector of which pieces named `prefix`… hold parts.

        However many pieces there are, and wherever they begin; beyond the last of them the numbers are 0.
        """
        out.zero_()
        for name in sorted(name for name in self.manifest["pieces"] if name.startswith(prefix)):
            with self._damage_named(name), safe_open(self.path / name, framework="pt") as file:
                first, numbers = int(file.metadata()["start"]), file.get_slice("numbers")
                low, high = max(first, start), min(first + numbers.get_shape()[0], start + len(out))
                if low < high:
                    out[low - start : high - start].copy_(numbers[low - first : high - first])

    def piece(self, name: str) -> Piece:
        """A piece as it is, for the next checkpoint."""

        def write(path: Path) -> None:
            shutil.copyfile(self.path / name, path)

        return Piece(self.manifest["pieces"][name], write)

    @contextlib.contextmanager
    def _damage_named(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # torch raises whatever comes, from EOFError to UnpicklingError
            raise damaged(self.path, f"{name} cannot be read ({one_line(error).rstrip('.')})") from None


def damaged(path: Path, fault: str) -> UserError:
    """The error that a checkpoint cannot be used."""
    return UserError(f"checkpoint {path} is damaged: {fault}. Remove it to use an older one.")


class CheckpointStore:
    """The checkpoints `checkpoint-N` of one output folder; N counts the steps of all clones together.

    Args:
        folder: the run's output folder, which all ranks see.
        limit: how many to keep; None keeps all.
        ranks: who writes them together.
    """

    def __init__(self, folder: Path, limit: int | None = None, ranks: Ranks | None = None) -> None:
        self._folder = folder
        self._limit = limit
        self._ranks = ranks or Ranks.alone()
        self._previous: Checkpoint | None = None
        self._saved = 0
        # A run's own, where several ranks write: some of one that was killed may live on for a while, and write too.
        self._own = f".{self._ranks.all_gather_object(secrets.token_hex(4))[0]}" if self._ranks.size > 1 else ""

    def all(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return complete_checkpoints(self._folder)

    def has(self, step: int) -> bool:
        """Whether there is a complete `checkpoint-{step}`."""
        return self.path(step) in self.all()

    def path(self, step: int) -> Path:
        """Where `checkpoint-{step}` is or would be."""
        return self._folder / f"checkpoint-{step}"

    def find(self, wanted: str) -> Checkpoint | None:
        """The checkpoint to resume from: a path, or "latest", which is None where there is none yet.

        Raises:
            UserError: the path is no complete checkpoint, or one of another format.
        """
        if wanted == "latest":
            found = self.all()
            return self.open(found[-1]) if found else None
        path = self._folder / wanted
        path = path if path.exists() else Path(wanted)
        if (path / MANIFEST).is_file() and path.resolve().parent != self._folder.resolve():
            raise UserError(
                f"`--resume_from_checkpoint {wanted}` is not in `--output_dir {self._folder}`, where the records of "
                "its run would be. Go on in its own folder, or copy that folder whole."
            )
        if not (path / MANIFEST).is_file():
            present = ", ".join(checkpoint.name for checkpoint in self.all()) or "none"
            raise UserError(
                f"`--resume_from_checkpoint {wanted}`: there is no complete checkpoint of that name. "
                f"`--output_dir` has: {present}."
            )
        return self.open(path)

    def open(self, path: Path) -> Checkpoint:
        """A complete checkpoint; what is saved next is linked to it where nothing has changed.

        Raises:
            UserError: it is damaged, or of another format.
        """
        manifest = _read_manifest(path)
        missing = [name for name in manifest["pieces"] if not (path / name).is_file()]
        if missing:
            raise damaged(path, f"{missing[0]} is missing")
        self._previous = Checkpoint(path, manifest)
        return self._previous

    def go_back_to(self, checkpoint: Checkpoint) -> None:
        """Puts aside later checkpoints, from which the run does not go on; removed once there is a new one."""
        for later in self.all():
            if checkpoint_step(later) > checkpoint_step(checkpoint.path):
                aside = later.with_name(f".{later.name}{_GIVEN_UP}")
                shutil.rmtree(aside, ignore_errors=True)
                later.rename(aside)

    def save(
        self,
        step: int,
        pieces: Mapping[str, Piece],
        facts: Mapping[str, Any],
        *,
        keep_older: bool = False,
        needed: Collection[Path] = (),
    ) -> Path:
        """Writes this rank's part of `checkpoint-{step}`, and completes it if all others have written theirs.

        No rank waits for another. The last one moves the checkpoint to its place and then, unless they are to be kept,
        removes the oldest ones beyond the limit. All ranks save the same checkpoints in the same order.

        Args:
            pieces: relative file name -> piece; each name is one rank's.
            facts: what the manifest says besides, the same on all ranks.
            keep_older: whether to remove none this time.
            needed: checkpoints that are kept beyond the limit, as they are still to be read; the same on all ranks.

        Raises:
            UserError: no space left on the device; what was there before is untouched.
        """
        final = self.path(step)
        partial = self._partial(final)
        part = {name: piece.version for name, piece in pieces.items()}
        self._saved += 1
        with no_space_named(final):
            self._write_part(partial, pieces, part)
            self._previous = Checkpoint(final, {"pieces": part})
            if self._ranks.is_last_to(f"checkpoint {self._saved}"):
                self._complete(partial, final, facts)
                if not keep_older:
                    self._remove_old(final, needed)
        return final

    def _partial(self, final: Path) -> Path:
        return partial_name(final.with_name(final.name + self._own))

    def _write_part(self, partial: Path, pieces: Mapping[str, Piece], part: Mapping[str, str]) -> None:
        if self._ranks.size == 1:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        with self._removed_on_error(partial, pieces):
            for name, piece in pieces.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                if not self._link(partial / name, name, piece.version):
                    piece.write(partial / name)
                    to_disk(partial / name)
            self._write_json(partial / PART.format(self._ranks.rank), part)

    def _complete(self, partial: Path, final: Path, facts: Mapping[str, Any]) -> None:
        with removed_on_error(partial):
            pieces: dict[str, str] = {}
            for path in [partial / PART.format(rank) for rank in range(self._ranks.size)]:
                pieces |= json.loads(path.read_text(encoding="utf-8"))
                path.unlink()
            self._write_json(partial / MANIFEST, {"format": _FORMAT, **facts, "pieces": pieces})
        with replaced_folder(final):
            partial.rename(final)

    @staticmethod
    def _write_json(path: Path, content: Mapping[str, Any]) -> None:
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        to_disk(path)

    @contextlib.contextmanager
    def _removed_on_error(self, partial: Path, pieces: Mapping[str, Piece]) -> Iterator[None]:
        """Makes room again; where several ranks write, each removes only what is its own."""
        if self._ranks.size == 1:
            with removed_on_error(partial):
                yield
            return
        try:
            yield
        except BaseException:
            for name in pieces:
                (partial / name).unlink(missing_ok=True)
            raise

    def _link(self, target: Path, name: str, version: str) -> bool:
        if self._previous is None or self._previous.manifest["pieces"].get(name) != version:
            return False
        # Others may still be writing their parts of the previous checkpoint, or be moving it just now. Until it is
        # moved, an older one of the same number may stand in its place: so that is not where to look first.
        path = self._previous.path
        return any(_taken_over(folder / name, target) for folder in (self._partial(path), path))

    def _remove_old(self, newest: Path, needed: Collection[Path]) -> None:
        for path in self._folder.glob(f".*{_GIVEN_UP}"):
            remove_folder(path)
        if self._limit is not None:
            for path in [path for path in self.all() if path not in (newest, *needed)][: -self._limit + 1 or None]:
                remove_folder(path)


def _taken_over(file: Path, target: Path) -> bool:
    """Links a file that has not changed, or copies it where there are no hard links; False if it is not there."""
    try:
        os.link(file, target)
    except FileNotFoundError:
        return False
    except OSError:
        shutil.copyfile(file, target)
        to_disk(target)
    return True


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, f"{MANIFEST} cannot be read ({one_line(error)})") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("pieces"), dict):
        raise damaged(path, f"{MANIFEST} names no pieces")
    if manifest.get("format") != _FORMAT:
        raise UserError(f"checkpoint {path} has format {manifest.get('format')}; this version reads {_FORMAT}.")
    return manifest
