"""One audit, from its settings to its report: what the command and the end of a training run have in common."""

from typing import Any

import torch

from ..files import FolderLock, clean, make_writable
from .measure import Judged, measure
from .outcome import write_outcome


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
    make_writable(folder)
    lock = FolderLock(folder)
    try:
        for place in (folder, folder / "work"):
            clean(place)  # of what a killed audit left half done
        return write_outcome(folder, measure(judged, device, silent), command)
    finally:
        lock.release()
