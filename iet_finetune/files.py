"""Atomic files and folders: written under a temporary name, renamed when complete, removed as a whole."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import UserError, disk_full, one_line

# The lock file of a folder in use.
LOCK_NAME = ".iet_finetune.lock"
# What diffusers calls a LoRA file, in a folder of its own or in a repository.
LORA_NAME = "pytorch_lora_weights.safetensors"
# A row for each image of a run; see `ensemble.ledger`.
LEDGER = "ledger.parquet"
# Where a run keeps the class images of prior preservation, unless it is told a folder.
CLASS_FOLDER = "class_images"
# A checkpoint is complete once it has this file.
MANIFEST = "manifest.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def checkpoint_step(folder: Path) -> int:
    """The N of a folder `checkpoint-N`; -1 if it has another name."""
    found = _CHECKPOINT.fullmatch(folder.name)
    return int(found[1]) if found else -1


def complete_checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints in an output folder, oldest first; none if there is no such folder."""
    found = [path for path in output.glob("checkpoint-*") if checkpoint_step(path) >= 0]
    return sorted((path for path in found if (path / MANIFEST).is_file()), key=checkpoint_step)


def partial_name(path: Path) -> Path:
    """Returns the temporary name for writing `path`; `clean` removes leftovers of killed processes."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yields a path to write a file to; it is moved to `path` if the block succeeds and removed if not."""
    partial = partial_name(path)
    with removed_on_error(partial):
        yield partial
    partial.replace(path)


@contextlib.contextmanager
def removed_on_error(partial: Path) -> Iterator[None]:
    """Removes the file or folder if the block fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[None]:
    """Moves a folder aside while the block creates its replacement, then removes it."""
    aside = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        folder.rename(aside)
    yield
    shutil.rmtree(aside, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder atomically: an interrupted removal does not leave what looks like a complete folder."""
    partial = partial_name(folder)
    folder.rename(partial)
    shutil.rmtree(partial)


def clean(folder: Path) -> None:
    """Removes what interrupted writes left in a folder, and restores what they had moved aside."""
    for aside in list(folder.glob(".*.replaced")):
        original = folder / aside.name.removeprefix(".").removesuffix(".replaced")
        if original.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(original)
    for partial in list(folder.glob(".*.partial")):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Flushes a file to disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def no_space_named(target: Path) -> Iterator[None]:
    """Reports a full disk as one clear error, whichever library noticed it."""
    try:
        yield
    except Exception as error:
        full = disk_full(error)
        if full is None:
            raise
        raise UserError(
            f"{full}, while writing {target}. What was saved before is complete: free some space, or lower "
            "`--checkpoints_total_limit`, and resume."
        ) from None


def gigabytes(size: int, rounded: Callable[[float], int]) -> str:
    """Formats a size; `rounded` is `math.ceil` for required and `math.floor` for available bytes."""
    # Rounded apart, so that the two also differ in print.
    return f"{rounded(size / 1e7) / 100:.2f} GB"


def make_writable(folder: Path) -> None:
    """Creates the output folder if needed; raises a `UserError` if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"`--output_dir {folder}` cannot be written: {reason}. Choose another folder.") from None


class FolderLock:
    """Holds a folder for one process until it is released or the process ends; a killed process leaves `LOCK_NAME`.

    Args:
        folder: an existing folder.
        patience: seconds to wait for another holder: the workers of a killed run outlive it by a few.

    Raises:
        UserError: another run holds the folder, or the lock file of another user stands in the way.
    """

    def __init__(self, folder: Path, patience: float = 15.0) -> None:
        from filelock import FileLock, Timeout  # 60 ms that commands without a lock do not need

        self._file = folder / LOCK_NAME
        # A soft lock would outlive a killed run, and one by thread could not be released by another.
        self._lock = FileLock(self._file, thread_local=False, fallback_to_soft=False)
        try:
            self._lock.acquire(timeout=patience, poll_interval=0.2)
        except Timeout:
            raise UserError(f"`--output_dir {folder}` is in use by another run. Choose another, or wait.") from None
        except PermissionError as error:
            raise UserError(f"`--output_dir {folder}` is locked by another user: remove {error.filename}.") from None
        except OSError:
            self._file.unlink(missing_ok=True)  # a file system without locks: nothing to hold

    def release(self) -> None:
        """Removes the lock file and lets another run use the folder."""
        if self._lock.is_locked:
            # While held: a waiter that then locks the removed file notices and retries. Windows removes it itself.
            with contextlib.suppress(PermissionError):
                self._file.unlink(missing_ok=True)
            self._lock.release()
