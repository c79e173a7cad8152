"""Decoding drawn images within the memory of a GPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def one_at_a_time(pipeline: Any, device: torch.device) -> Iterator[None]:
    """On a GPU, images are decoded one after the other: 16 of 1024 pixels at once take 60 GB there (docs/gpu.md)."""
    vae: Any = getattr(pipeline, "vae", None)
    if device.type == "cpu" or not hasattr(vae, "use_slicing"):
        yield
        return
    before, vae.use_slicing = vae.use_slicing, True
    try:
        yield
    finally:
        vae.use_slicing = before
