"""One layer of a denoiser with the adapter that trains on it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .factors import as_matrix, fold_scaling, unfold_scaling
from .quantised import QuantisedLinear
from .spectra import LowRank

NAME = "default"  # of the adapter in peft, as diffusers' own scripts have it
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer of the denoiser with its adapter: the layer's weight is W + scaling · B A.

    Attributes:
        base: the frozen layer, on the training device.
        up, down: names of the parameters B and A.
        up_weight, down_weight: those parameters: (out, r) and (r, in), or (out, r, 1, 1) and (r, in, kh, kw).
        scaling: alpha / r, or alpha / √r with rsLoRA.
    """

    base: nn.Module
    up: str
    down: str
    up_weight: nn.Parameter
    down_weight: nn.Parameter
    scaling: float

    @property
    def weight(self) -> Tensor:
        """What holds W: (out, in) or (out, in, kh, kw) if it is not quantised."""
        return self.base.get_parameter("weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of W."""
        return self.base.shape if isinstance(self.base, QuantisedLinear) else tuple(self.weight.shape)

    @property
    def holds_remainder(self) -> list[Tensor]:
        """The frozen tensors that a remainder changes."""
        return [self.base.up, self.base.down] if isinstance(self.base, QuantisedLinear) else [self.weight]

    def energy(self) -> float:
        """‖W‖², as it is held."""
        weight = self.base.plain_weight() if isinstance(self.base, QuantisedLinear) else self.weight.detach()
        return weight.double().square().sum().item()

    def update(self, tensors: Tensors) -> LowRank:
        """scaling · B A as factors (out, r) and (r, in·kh·kw), float64; a frozen A is not among the tensors."""
        down = tensors.get(self.down, self.down_weight)
        return fold_scaling(as_matrix(tensors[self.up].cpu(), down.cpu()), self.scaling)

    def factors(self, update: LowRank) -> LowRank:
        """B and A as matrices in fp32, of which `update` gives this update; rounded once."""
        return LowRank(*(factor.to(torch.float32) for factor in unfold_scaling(update, self.scaling)))


def cast_inputs(denoiser: nn.Module, cast: bool) -> None:
    """Whether adapters put their inputs into their own precision, as peft lets them.

    Where autocast is on, it takes them back to half precision at once: all that comes of it is a copy.
    """
    layers: list[Any] = [module for module in denoiser.modules() if hasattr(module, "cast_input_dtype_enabled")]
    for layer in layers:
        layer.cast_input_dtype_enabled = cast


def adapted_layers(denoiser: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """The layers of a denoiser that have an adapter, by the module's name and in the module's order."""
    for name, module in denoiser.named_modules():
        if hasattr(module, "lora_A") and NAME in module.lora_A:
            ups, downs = module.lora_B, module.lora_A
            yield (
                name,
                AdaptedLayer(
                    base=module.get_base_layer(),
                    up=f"{name}.lora_B.{NAME}.weight",
                    down=f"{name}.lora_A.{NAME}.weight",
                    up_weight=ups[NAME].weight,
                    down_weight=downs[NAME].weight,
                    scaling=module.scaling[NAME],
                ),
            )
