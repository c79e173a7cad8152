"""Audits a finished run, and shows the audit in its model card."""

import shlex
from pathlib import Path

import torch

from ..audit.flags import PROGRAM
from ..audit.report.summary import as_text
from ..audit.request import CONFIG_NAME, AuditRequest, read_request
from ..audit.run import run_audit
from ..lora.reading import foreign_tensors
from .card import show_audit


def audit_model(folder: Path, device: torch.device) -> str:
    """Audits a model that was trained here, with the flags of its run; returns the text to print at the end.

    Raises:
        UserError: the input is wrong; says how to fix it.
    """
    return audit_and_show(
        read_request({"model": str(folder)}), device, shlex.join([*PROGRAM.split(), "--model", str(folder)])
    )


def audit_and_show(request: AuditRequest, device: torch.device, command: str) -> str:
    """Audits, updates the model card of a run that was trained here, and returns the audit as text.

    Args:
        command: the line that repeats the audit.

    Raises:
        UserError: the input is wrong; says how to fix it.
    """
    audit = run_audit(request, device, command, read_lora=foreign_tensors)
    if request.own and (request.output.parent / CONFIG_NAME).is_file():
        show_audit(request.output.parent)
    return as_text(audit, request.output)
