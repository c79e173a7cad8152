"""The audit on a card."""

import time
import warnings
from pathlib import Path
from typing import Any

import torch

from ...audit.in_memory import audit
from ...families.tiny import RESOLUTION, tiny_sd
from .. import shapes
from ..checks import Machine, expect
from ..trials import Memory, pictures, where_it_fits

# GB to decode 16 images of 1024 pixels.
DECODING_GB = 12.5


def audits(machine: Machine, found: dict[str, Any]) -> None:
    """A tiny pipeline against a reference, with pixels as features, on this device and twice."""
    model: Any = tiny_sd()
    model.to(machine.device)
    flags: dict[str, Any] = {
        "num_images": 16, "num_inference_steps": 4, "resolution": RESOLUTION,
        "features": [str(_features(machine.scratch / "features.pt"))],
        "eval_batch_size": 8, "membership_draws": 8,
    }  # fmt: skip
    records = []
    for _ in range(2):
        began = time.perf_counter()
        records.append(
            audit(
                model,
                pictures(24, RESOLUTION),
                pictures(12, RESOLUTION),
                reference=tiny_sd(seed=1),
                silent=True,
                **flags,
            )
        )
        found["seconds"] = time.perf_counter() - began
    first, second = (record.metrics for record in records)
    found["metrics"] = len(first)
    expect(repr(first) == repr(second), "the same audit gave other numbers")


class _Tiles(torch.nn.Module):
    """Features that are the colours of 4 x 4 tiles."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 48) of (B, 3, H, W)."""
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def _features(file: Path) -> Path:
    """A TorchScript file of them, for there may be no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(_Tiles(), torch.zeros(1, 3, 64, 64)).save(str(file))
    return file


def decoding(machine: Machine, found: dict[str, Any]) -> None:
    """What a pipeline needs to decode 16 images of 1024 pixels, as it comes and with slices."""
    machine.need_card()
    with torch.device("cuda"):
        vae: Any = shapes.vae()
    vae.eval()
    latents, memory = torch.randn(16, 4, 128, 128, device="cuda"), Memory()
    for words, prepare in (("sliced", vae.enable_slicing), ("at once", vae.disable_slicing)):
        prepare()
        with where_it_fits(found, words):
            began = time.perf_counter()
            with torch.no_grad():
                vae.decode(latents)
            torch.cuda.synchronize()
            found[f"{words}, s"], found[f"{words}, GB"] = time.perf_counter() - began, memory.peak()
    expect("sliced, GB" in found, "it does not fit with slices")
    expect(found["sliced, GB"] <= DECODING_GB, f"more than {DECODING_GB} GB with slices")
