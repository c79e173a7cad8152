"""Measuring how much a finished pipeline repeats its training images, and how good its images are.

`from iet_finetune.audit import audit` measures a pipeline in memory; the command is `iet-finetune audit`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .in_memory import audit as audit
    from .report.record import AuditRecord as AuditRecord


_HOMES = {"audit": "in_memory", "AuditRecord": "report.record"}


# At first use, so that the flags of an audit import no torch.
def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
