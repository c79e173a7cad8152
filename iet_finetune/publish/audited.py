"""An audit of a finished run, put into its model card."""

import shlex
from pathlib import Path

import torch

from ..audit.flags import PROGRAM
from ..audit.measure import Judged
from ..audit.report.summary import as_text
from ..audit.request import CONFIG_NAME, judge
from ..audit.run import run_audit
from .card import show_audit


def audit_model(folder: Path, device: torch.device) -> str:
    """Audits a model that was trained here as the flags of its run say; returns what there is to say at the end.

    Raises:
        UserError: whatever the user can mend.
    """
    return audit_and_show(
        judge({"model": str(folder)}), device, shlex.join([*PROGRAM.split(), "--model", str(folder)])
    )


def audit_and_show(judged: Judged, device: torch.device, command: str) -> str:
    """Audits, puts what was found into the card of a run that was trained here, and returns it as text.

    Args:
        command: the line that repeats the audit.

    Raises:
        UserError: whatever the user can mend.
    """
    audit = run_audit(judged, device, command)
    if judged.own and (judged.output.parent / CONFIG_NAME).is_file():
        show_audit(judged.output.parent)
    return as_text(audit, judged.output)
