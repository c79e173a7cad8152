"""The output folder: whether it may be used, and how finished things get into it."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from .checkpoint import no_space_named, removed_on_error, replaced_folder
from .config import Config
from .errors import UserError, one_line

INDEX = "model_index.json"


def claim(folder: Path, resuming: bool) -> None:
    """Creates the output folder and makes sure that it can be written and holds nothing that would be mixed up.

    Raises:
        UserError: it is a file, cannot be written, or is not empty although nothing is resumed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"`--output_dir {folder}` cannot be written: {reason}. Choose another folder.") from None
    if not resuming and any(folder.iterdir()):
        raise UserError(
            f"`--output_dir {folder}` is not empty. Choose another, or go on from its newest checkpoint with "
            "`--resume_from_checkpoint latest`."
        )


def check_space(folder: Path, needed: int) -> None:
    """Raises a `UserError` unless the disk has room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no space left on the device for `--output_dir {folder}`: one checkpoint and the pipeline need some "
            f"{needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free. Choose a folder on another disk."
        )


def publish(folder: Path, save: Callable[[Path], None]) -> None:
    """Lets `save` write a pipeline beside its place and moves it there, model_index.json last.

    Raises:
        UserError: no space left on the device.
    """
    partial = folder / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with no_space_named(folder), removed_on_error(partial):
        save(partial)
    (folder / INDEX).unlink(missing_ok=True)
    for entry in sorted(partial.iterdir(), key=lambda path: path.name == INDEX):
        if entry.is_dir():
            with replaced_folder(folder / entry.name):
                entry.rename(folder / entry.name)
        else:
            entry.replace(folder / entry.name)
    partial.rmdir()


def write_config(folder: Path, config: Config) -> None:
    """`training_config.yaml`: every effective flag, no token; `--config` reads it again."""
    partial = folder / ".training_config.yaml.partial"
    with removed_on_error(partial):
        partial.write_text(yaml.safe_dump(config.to_flags(), sort_keys=False), encoding="utf-8")
    partial.replace(folder / "training_config.yaml")
