"""Checkpoints that are complete or absent: written beside their place, renamed last, checked before they are used."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import UserError, one_line
from .files import no_space_named, partial_name, remove_folder, removed_on_error, replaced_folder, to_disk

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_FORMAT = 1
_GIVEN_UP = ".given-up"


@dataclass(frozen=True)
class Piece:
    """One file of a checkpoint.

    Attributes:
        version: changes whenever the content does; a file of the same version is linked, not written again.
        write: writes the content to a path.
    """

    version: str
    write: Callable[[Path], None]


def tensors_piece(version: str, tensors: Mapping[str, Tensor]) -> Piece:
    """A piece holding named tensors, as safetensors."""
    return Piece(version, lambda path: save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path))


def state_piece(version: str, state: Any) -> Piece:
    """A piece holding nested dicts and lists of tensors and numbers, loadable without pickle's dangers."""

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            torch.save(state, stream)

    return Piece(version, write)


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
        folder: the run's output folder.
        limit: how many to keep; None keeps all.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self._folder = folder
        self._limit = limit
        self._previous: Checkpoint | None = None

    def all(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        found = [path for path in self._folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
        return sorted((path for path in found if (path / MANIFEST).is_file()), key=_number)

    def has(self, step: int) -> bool:
        """Whether there is a complete `checkpoint-{step}`."""
        return self._folder / f"checkpoint-{step}" in self.all()

    def find(self, wanted: str) -> Checkpoint | None:
        """The checkpoint to resume from: a path, or "latest", which is None where there is none yet.

        Raises:
            UserError: the path is no complete checkpoint, or one of another format.
        """
        if wanted == "latest":
            found = self.all()
            return self._open(found[-1]) if found else None
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
        return self._open(path)

    def _open(self, path: Path) -> Checkpoint:
        manifest = _read_manifest(path)
        missing = [name for name in manifest["pieces"] if not (path / name).is_file()]
        if missing:
            raise damaged(path, f"{missing[0]} is missing")
        self._previous = Checkpoint(path, manifest)
        return self._previous

    def go_back_to(self, checkpoint: Checkpoint) -> None:
        """The later checkpoints belong to a course that is given up: put aside now, removed when a new one stands."""
        for later in self.all():
            if _number(later) > _number(checkpoint.path):
                aside = later.with_name(f".{later.name}{_GIVEN_UP}")
                shutil.rmtree(aside, ignore_errors=True)
                later.rename(aside)

    def save(
        self, step: int, pieces: Mapping[str, Piece], facts: Mapping[str, Any], *, keep_older: bool = False
    ) -> Path:
        """Writes `checkpoint-{step}` and then, unless told to keep them, removes the oldest ones beyond the limit.

        Args:
            pieces: relative file name -> piece.
            facts: what the manifest says besides.

        Raises:
            UserError: no space left on the device; what was there before is untouched.
        """
        final = self._folder / f"checkpoint-{step}"
        partial = partial_name(final)
        manifest = {"format": _FORMAT, **facts, "pieces": {name: piece.version for name, piece in pieces.items()}}
        with no_space_named(final):
            self._write(partial, pieces, manifest)
        with replaced_folder(final):
            partial.rename(final)
        self._previous = Checkpoint(final, manifest)
        if not keep_older:
            self._remove_old(final)
        return final

    def _write(self, partial: Path, pieces: Mapping[str, Piece], manifest: Mapping[str, Any]) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        with removed_on_error(partial):
            for name, piece in pieces.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                if not self._link(partial / name, name, piece.version):
                    piece.write(partial / name)
                    to_disk(partial / name)
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            to_disk(partial / MANIFEST)

    def _link(self, target: Path, name: str, version: str) -> bool:
        if self._previous is None or self._previous.manifest["pieces"].get(name) != version:
            return False
        try:
            os.link(self._previous.path / name, target)
        except OSError:
            return False
        return True

    def _remove_old(self, newest: Path) -> None:
        for path in self._folder.glob(f".*{_GIVEN_UP}"):
            remove_folder(path)
        if self._limit is not None:
            for path in [path for path in self.all() if path != newest][: -self._limit + 1 or None]:
                remove_folder(path)


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


def _number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1
