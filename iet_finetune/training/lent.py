"""A frozen denoiser without a second network: the live one with other weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..families.base import evaluating


class Lent:
    """The denoiser with other weights, which take the place of the live ones for the time of a call.

    Attributes:
        values: live parameter or buffer -> what stands in for it, on its device.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self.values: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Sequence[Tensor]) -> None:
        """Copies what these live tensors hold now; memory of earlier copies is used again."""
        for tensor in tensors:
            if tensor in self.values and self.values[tensor].shape == tensor.shape:
                self.values[tensor].copy_(tensor.detach())
            else:
                self.values[tensor] = tensor.detach().clone()

    @property
    def named(self) -> dict[str, Tensor]:
        """The copies by the names of what they stand in for."""
        named = (*self._denoiser.named_parameters(), *self._denoiser.named_buffers())
        return {name: self.values[tensor] for name, tensor in named if tensor in self.values}

    @torch.no_grad()
    def restore(self, named: Mapping[str, Tensor]) -> None:
        """Takes copies that were `named`, laid out in memory as the live tensors are, as bits depend on it."""
        live = dict((*self._denoiser.named_parameters(), *self._denoiser.named_buffers()))
        for name, saved in named.items():
            like = live[name].detach()
            place = torch.empty_like(like) if like.shape == saved.shape else like.new_empty(saved.shape)
            self.values[live[name]] = place.copy_(saved)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's output, without gradient or dropout."""
        # The tensors that a pending backward pass has saved are the live ones: they are back in place before it.
        own = [tensor.data for tensor in self.values]
        try:
            for tensor, value in self.values.items():
                tensor.data = value
            with evaluating(self._denoiser):
                return self._denoiser(*args, **kwargs)
        finally:
            for tensor, data in zip(self.values, own, strict=True):
                tensor.data = data
