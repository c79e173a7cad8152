"""Copies from the host to the device that trains, for which the host does not wait."""

import torch
from torch import Tensor


def copies_ahead(device: torch.device) -> bool:
    """Whether the device copies from pinned memory while the host goes on; only CUDA keeps the source until then."""
    return device.type == "cuda"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on the device.

    From ordinary memory a GPU would copy only when it has done everything before.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if copies_ahead(device) else tensor.to(device)
