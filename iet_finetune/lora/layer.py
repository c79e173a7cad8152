"""One layer of a LoRA adapter, and its scaling moved into the factors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .factors import as_matrix, fold_scaling
from .spectra import LowRank

DENOISERS = ("unet", "transformer", "transformer_2", "prior")
COMPONENTS = (*DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3")


class LoraLayer(NamedTuple):
    """One layer of an adapter; its update is scaling · up · down.

    Attributes:
        up: (out, r) of a linear layer or (out, r, 1, 1) of a convolution; peft's lora_B, of any floating dtype.
        down: (r, in) or (r, in, kh, kw); peft's lora_A.
        scaling: alpha / r, or alpha / √r with rsLoRA; positive.
    """

    up: Tensor
    down: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """r, the width of the factors."""
        return self.down.shape[0]

    def update(self) -> LowRank:
        """The update as the factors of one matrix (out, in·kh·kw), float64, the scaling in it."""
        return fold_scaling(as_matrix(self.up, self.down), self.scaling)

    def folded(self, dtype: torch.dtype | None = None) -> "LoraLayer":
        """The same update with scaling 1, as tools read it that look at no alpha.

        The scaling is m · 2^e with 1 <= m < 2. Each factor takes half of 2^e, which is exact, and `up` takes m: one
        rounding of one factor, and none where the scaling is a power of two. Halving 2^e keeps small numbers in range.

        Args:
            dtype: of both factors, rounded once. Without it each keeps its own, unless half precision cannot hold the
                product; then both are fp32.
        """
        if self.scaling == 1:
            return self if dtype is None else self._replace(up=self.up.to(dtype), down=self.down.to(dtype))
        half, exponent = math.frexp(self.scaling)
        shift = (exponent - 1) // 2
        up = self.up.double() * math.ldexp(half, exponent - shift)
        down = self.down.double() * math.ldexp(1.0, shift)
        if dtype is not None:
            return LoraLayer(up.to(dtype), down.to(dtype), 1.0)
        if _holds(up, self.up.dtype) and _holds(down, self.down.dtype):
            return LoraLayer(up.to(self.up.dtype), down.to(self.down.dtype), 1.0)
        return LoraLayer(up.float(), down.float(), 1.0)


def _holds(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether nothing is lost in this dtype that fp32 would keep."""
    return dtype.itemsize >= 4 or torch.equal(tensor.to(dtype).double(), tensor)
