"""The output folder: checks that it may be used, and moves finished results into it."""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from ..config.config import Config
from ..distributed.groups import Ranks
from ..errors import UserError, one_line
from ..files import (
    CLASS_FOLDER,
    LOCK_NAME,
    LORA_NAME,
    FolderLock,
    clean,
    make_writable,
    no_space_named,
    partial_name,
    remove_folder,
    removed_on_error,
    replaced_folder,
    written_beside,
)

INDEX = "model_index.json"
CONFIG = "training_config.yaml"
# Without one of these there is no finished result in a folder.
MARKS = (INDEX, LORA_NAME)
# The folder of what is saved of single rounds.
ROUNDS = "rounds"
AUDIT_FILES = ("audit/audit.json", "audit/pairs.json", "audit/report.html")


def claim(folder: Path, resuming: bool) -> FolderLock:
    """Creates and locks the output folder, checks that it is writable and holds nothing else, and removes the partial
    files of an interrupted run.

    Raises:
        UserError: it is a file, cannot be written, is in use, is not empty although nothing is resumed, or holds
            other things than a run that could be resumed.
    """
    make_writable(folder)
    lock = FolderLock(folder)
    try:
        _check_content(folder, resuming)
        clean(folder)
        clean(folder / "validation")
        clean(folder / ROUNDS)
    except BaseException:
        lock.release()
        raise
    return lock


def claim_together(folder: Path, ranks: Ranks, resuming: bool) -> FolderLock | None:
    """Calls `claim` on rank 0; the other ranks check that they see the same folder.

    Returns:
        the lock on rank 0, None on the others.

    Raises:
        UserError: as `claim`, or a rank does not see what rank 0 writes there.
    """
    lock = claim(folder, resuming) if ranks.is_main else None
    try:
        with contextlib.ExitStack() as stack:
            sign = None
            if ranks.is_main:
                sign = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".partial")).name
            name = Path(ranks.all_gather_object(sign)[0]).name
            if not (folder / name).exists():
                raise UserError(
                    f"`--output_dir {folder}` is not the same folder on all machines: choose one on storage they "
                    "share."
                )
            ranks.barrier()
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return lock


def _check_content(folder: Path, resuming: bool) -> None:
    names = [entry.name for entry in folder.iterdir()]
    # Class images may be there before anything else of a run, and a new start goes on drawing them.
    entries = [name for name in names if name not in (LOCK_NAME, CLASS_FOLDER) and not name.endswith(".partial")]
    if entries and not resuming:
        raise UserError(
            f"`--output_dir {folder}` is not empty. Choose another, or go on from its newest checkpoint with "
            "`--resume_from_checkpoint latest`."
        )
    if entries and CONFIG not in entries and not any(name.startswith("checkpoint-") for name in entries):
        raise UserError(f"`--output_dir {folder}` is not empty and holds no run to go on with. Choose another.")


def make_logging_folder(folder: Path) -> None:
    """Creates the trackers' folder if needed; raises a `UserError` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"`--logging_dir`: {folder} cannot be made: {reason}. Choose another.") from None


def check_space(folder: Path, needed: int) -> None:
    """Raises a `UserError` unless the disk has room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no space left on the device for `--output_dir {folder}`: one checkpoint and the pipeline need some "
            f"{needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free. Choose a folder on another disk."
        )


def publish(folder: Path, save: Callable[[Path], None]) -> None:
    """Calls `save` with a new folder for a pipeline or LoRA file and moves its contents into place, the mark last.

    A result of the other kind, from a shorter run in the same folder, is removed.

    Raises:
        UserError: no space left on the device.
    """
    partial = partial_name(folder / "pipeline")
    shutil.rmtree(partial, ignore_errors=True)
    with no_space_named(folder), removed_on_error(partial):
        save(partial)
    if not (partial / INDEX).is_file():
        _remove_pipeline(folder)
    for mark in MARKS:
        (folder / mark).unlink(missing_ok=True)
    for entry in sorted(partial.iterdir(), key=lambda path: path.name in MARKS):
        if entry.is_dir():
            with replaced_folder(folder / entry.name):
                entry.rename(folder / entry.name)
        else:
            entry.replace(folder / entry.name)
    partial.rmdir()


def publish_round(folder: Path, round_: int, save: Callable[[Path], None], *, again: bool) -> None:
    """Calls `save` with a new folder and moves it to `rounds/round-N`.

    Args:
        again: whether to replace what is there, which came from a run that went on from an earlier round; otherwise it
            stays.

    Raises:
        UserError: no space left on the device.
    """
    target = folder / ROUNDS / f"round-{round_}"
    if target.is_dir() and not again:
        return
    target.parent.mkdir(exist_ok=True)
    partial = partial_name(target)
    with no_space_named(target), removed_on_error(partial):
        save(partial)
    with replaced_folder(target):
        partial.rename(target)


@contextlib.contextmanager
def audit_of_other_weights_removed(folder: Path) -> Iterator[None]:
    """Removes the folder's audit if the block changes the weights; generated images stay.

    Images and metrics of the old weights that are kept beside it are not used for the new ones.
    """
    before = _weights_digest(folder) if (folder / AUDIT_FILES[0]).exists() else None
    yield
    if before is not None and _weights_digest(folder) != before:
        for name in AUDIT_FILES:
            (folder / name).unlink(missing_ok=True)


def _weights_digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]):
        if not file.parent.name.startswith("checkpoint-"):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def _remove_pipeline(folder: Path) -> None:
    """Moves the index aside first: a partly removed pipeline never looks complete, and a killed removal resumes."""
    aside = folder / f".{INDEX}.removed"
    if (folder / INDEX).is_file():
        (folder / INDEX).replace(aside)
    if not aside.is_file():
        return
    index = json.loads(aside.read_text(encoding="utf-8"))
    for part in (folder / name for name, value in index.items() if isinstance(value, list)):
        if part.is_dir():  # a component that the pipeline does without has no folder
            remove_folder(part)
    aside.unlink()


def write_config(folder: Path, config: Config) -> None:
    """`training_config.yaml`: every effective flag, no token; `--config` reads it again."""
    with written_beside(folder / CONFIG) as partial:
        partial.write_text(yaml.safe_dump(config.to_flags(), sort_keys=False), encoding="utf-8")
