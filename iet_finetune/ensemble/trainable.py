"""The tensors that differ from clone to clone: the ensemble's only view of a denoiser or an adapter."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..distributed.placement import Placement
from .budget import Need

Tensors = Mapping[str, Tensor]


class Trainable:
    """The tensors of a module that differ from clone to clone: its trainable parameters and its buffers.

    Args:
        module: the denoiser.
        buffers: whether its buffers count; those of a frozen one do not.

    Attributes:
        parameters: name -> parameter, in the module's order, each fp32 on the training device.
        buffers: name -> buffer, taken along unchanged by the optimizer.
    """

    def __init__(self, module: nn.Module, buffers: bool = True) -> None:
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
        }
        self.buffers: dict[str, Tensor] = dict(module.named_buffers()) if buffers else {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, detached and live: they change with the next step."""
        return {name: tensor.detach() for name, tensor in (*self.parameters.items(), *self.buffers.items())}

    def need(self, placement: Placement) -> Need:
        """Bytes of the gradients, and of the live clones in a checkpoint."""
        tensors = sum(tensor.nbytes for tensor in self.tensors.values())
        gradients = sum(parameter.nbytes for parameter in self.parameters.values())
        return Need(device=gradients, checkpoint=placement.at_once * tensors)

    @torch.no_grad()
    def load(self, values: Tensors) -> None:
        """Copies values into the live tensors; those not in `values` stay as they are."""
        live = self.tensors
        copy_together([live[name] for name in values], list(values.values()))


@torch.no_grad()
def copy_together(live: list[Tensor], values: list[Tensor]) -> None:
    """Overwrites tensors, all on one device, with others of the same shapes; a GPU is not waited for.

    From pinned memory it copies while the host goes on; nobody changes the values before it has.
    """
    if live:
        torch._foreach_copy_(live, values, non_blocking=live[0].is_cuda)
