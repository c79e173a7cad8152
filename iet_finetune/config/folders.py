"""Folders that can be told to be wrong in a moment, before anything heavy is imported."""

import os
from pathlib import Path

from ..errors import UserError
from .config import Config


def check_folders(config: Config) -> None:
    """Raises a `UserError` if the output folder cannot be made, or if a folder of images is not there.

    It makes nothing: what else may be wrong with these folders shows when they are used.
    """
    _check_output(config.output_path)
    # `--smoke` makes images of its own.
    images = {"train_data_dir": config.data.train_data_dir, "holdout_data_dir": config.audit.holdout_data_dir}
    for name, folder in images.items():
        if folder is not None and not config.training.smoke and not os.path.isdir(folder):
            raise UserError(f"`--{name} {folder}` is not a folder. Give the folder that holds the images.")


def _check_output(folder: Path) -> None:
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise _not_written(folder, str(error.strerror)) from None
    if not nearest.is_dir():
        raise _not_written(folder, "it is a file" if nearest == folder else f"`{nearest}` is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _not_written(folder, f"`{nearest}` does not let this user write")


def _not_written(folder: Path, reason: str) -> UserError:
    return UserError(f"`--output_dir {folder}` cannot be written: {reason}. Choose another folder.")
