"""One audit, from its settings to its report: what the command and the end of a training run have in common."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, one_line
from ..files import no_space_named
from ..ledger import LEDGER
from ..outputs import FolderLock
from .measure import Judged, measure
from .outcome import write_outcome

FOLDER = "audit"


def run_audit(judged: Judged, device: torch.device, command: str, silent: bool = False) -> dict[str, Any]:
    """Audits into `judged.output`, which is held meanwhile, and returns what is in `audit.json`.

    What an interrupted audit computed there is used again.

    Args:
        command: the line that repeats the audit, for the report.
        silent: without progress bars.

    Raises:
        UserError: whatever the user can mend.
    """
    folder = judged.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"`--output_dir {folder}` cannot be written: {reason}. Choose another folder.") from None
    lock = FolderLock(folder)
    try:
        with no_space_named(folder):
            measured = measure(judged, device, silent)
            ledger = Path(judged.model) / LEDGER if judged.model is not None else Path(LEDGER)
            return write_outcome(folder, measured, command, ledger)
    finally:
        lock.release()
