"""One audit, from its settings to its report."""

import torch

from ..files import FolderLock, clean, make_writable
from .inputs.pipelines import LoraReader
from .measure import measure
from .outcome import write_outcome
from .report.record import AuditRecord
from .request import AuditRequest
from .sources import AuditSources, find_sources


def run_audit(
    request: AuditRequest,
    device: torch.device,
    command: str | None,
    silent: bool = False,
    sources: AuditSources | None = None,
    read_lora: LoraReader | None = None,
) -> AuditRecord:
    """Audits into `request.output`, which is locked meanwhile, and returns what is in `audit.json`.

    What an interrupted audit computed there is reused.

    Args:
        command: the line that repeats the audit, for the report; None without one.
        silent: without progress bars.
        sources: pipelines and images; None finds those of the request.
        read_lora: reads LoRA files that diffusers does not; None leaves all to diffusers.

    Raises:
        UserError: the input is wrong; says how to fix it.
    """
    folder = request.output
    make_writable(folder)
    lock = FolderLock(folder)
    try:
        for place in (folder, folder / "work"):
            clean(place)  # of what a killed audit left half done
        measured = measure(request, sources or find_sources(request, read_lora=read_lora), device, silent)
        return write_outcome(folder, measured, command)
    finally:
        lock.release()
