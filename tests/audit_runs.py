"""What tests of whole audits share: a small feature network, the command, and what it wrote."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iet_finetune.cli.audit_command import audit_command


class Mosaic(nn.Module):
    """Features that are the colours of 4 x 4 tiles: alike images have alike ones, and there is nothing to wait for."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 48) of (B, 3, H, W)."""
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def save_mosaic(folder: Path) -> Path:
    """A TorchScript file of such features, as SSCD comes in one."""
    path = folder / "mosaic.pt"
    with warnings.catch_warnings():
        # torch would rather have files of another kind; SSCD comes in these.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Mosaic(), torch.zeros(1, 3, 288, 288)).save(str(path))
    return path


def typed(settings: dict[str, Any]) -> list[str]:
    """Flags as they are typed."""
    words: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(item) for item in values)]
    return words


def run_audit(output: Path, **settings: Any) -> dict[str, Any]:
    """Runs the command in this process and returns what `audit.json` says."""
    audit_command(typed({**settings, "output_dir": output}))
    return read_audit(output)


def read_audit(output: Path) -> dict[str, Any]:
    """The content of the audit in a folder."""
    return dict(json.loads((output / "audit.json").read_text(encoding="utf-8")))
