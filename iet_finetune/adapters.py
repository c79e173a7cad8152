"""What is trained, seen as one ordered set of named tensors that can be read and loaded in place."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Trainable:
    """The tensors of a module that differ from clone to clone: its trainable parameters and its buffers.

    Attributes:
        parameters: name -> parameter, in the module's order, each fp32 on the training device.
        buffers: name -> buffer, taken along unchanged by the optimizer.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
        }
        self.buffers: dict[str, Tensor] = dict(module.named_buffers())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, detached and live: they change with the next step."""
        return {name: tensor.detach() for name, tensor in (*self.parameters.items(), *self.buffers.items())}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Copies values into the live tensors; those not in `values` stay as they are."""
        live = self.tensors
        for name, value in values.items():
            # From pinned memory a GPU copies while the host goes on; nobody changes the values before it has.
            live[name].copy_(value, non_blocking=live[name].is_cuda)
