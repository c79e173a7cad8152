"""A moving average of the weights that clones hand on from round to round, and that skips masked steps."""

from collections.abc import Mapping

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..distributed.placement import Placement
from .budget import Need
from .trainable import copy_together

# Name of the number that tells how much of the average is still what it started from.
START_SHARE = "start_share"


class EMA:
    """ema ← decay · ema + (1 − decay) · θ, with the warm-up of diffusers' `EMAModel`.

    The decay depends on the clone's own step number over the whole run. `EMAModel` itself starts again with decay 0 in
    every new instance and cannot leave out a step, so only its decay rule is used.

    Args:
        parameters: name -> live parameter.
        max_decay: the highest decay.
        start_share: whether to keep the product of all decays since `load`, under the name `START_SHARE`.

    Attributes:
        tensors: name -> the average, live.
    """

    def __init__(self, parameters: Mapping[str, Tensor], max_decay: float, start_share: bool = False) -> None:
        self._parameters = list(parameters.values())
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        if start_share:
            # The average of 1 followed by nothing but 0.
            device = self._parameters[0].device
            self._parameters.append(torch.zeros((), device=device))
            self.tensors[START_SHARE] = torch.ones((), device=device)
        self._rule = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=max_decay)

    def need(self, placement: Placement) -> Need:
        """Bytes of the live average, and of those of the live clones in a checkpoint."""
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        return Need(device=size, checkpoint=placement.at_once * size)

    @torch.no_grad()
    def update(self, step: int, masked: Tensor) -> None:
        """Updates the average with the weights after a clone's step.

        Args:
            step: number of steps this clone has taken, this one included.
            masked: scalar fp32 on the device, 1 where the step changed nothing and the average must not either.
        """
        weight = (1 - self._rule.get_decay(step)) * (1 - masked)
        # One weight tensor each: a single one would be taken for a Python number and read back from the device.
        averages = list(self.tensors.values())
        torch._foreach_lerp_(averages, self._parameters, [weight] * len(averages))

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Goes on from another average."""
        copy_together([self.tensors[name] for name in values], list(values.values()))
