"""Frozen linear layers whose weights are held in 4 or 8 bits, below adapters that train in fp32."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The 16 numbers of NF4 (QLoRA, arXiv 2305.14314, appendix E): quantiles of a normal distribution, the largest 1.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# How many weights of NF4 share a scale.
BLOCK = 64
# In the place of a scale of 0.
TINY = torch.finfo(torch.float32).tiny


def nf4_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in NF4, as bitsandbytes holds it: two numbers in a byte, the first one in the upper half.

    Args:
        weight: of any shape and floating dtype.

    Returns:
        (⌈numbers / 2⌉,) int8, and the largest magnitude of every `BLOCK` numbers, (⌈numbers / BLOCK⌉,) fp32.
    """
    flat = weight.detach().flatten().float()
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1)
    codes = torch.tensor(NF4, device=weight.device)
    # Each number becomes the nearest code; one in the middle between two the lower.
    bounds = (codes[1:] + codes[:-1]) / 2
    nearest = torch.bucketize(
        blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None], bounds, out_int32=True
    )
    pairs = nearest.to(torch.uint8).view(-1, 2)[: (flat.numel() + 1) // 2]
    return (pairs[:, 0] * 16 + pairs[:, 1]).view(torch.int8), scale


def int8_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in 8 bits, each row by its largest magnitude.

    Args:
        weight: (out, in) of any floating dtype.

    Returns:
        (out, in) int8 in [-127, 127], and scales (out,) fp32, of which the weight is nearly the product.
    """
    rows = weight.detach().float()
    scale = rows.abs().amax(dim=1) / 127
    return torch.round(rows / scale.clamp(min=TINY)[:, None]).to(torch.int8), scale


class QuantisedLinear(nn.Linear):
    """A frozen linear layer that holds its weight in NF4 or int8 and computes in the precision of its input.

    Its output is x Wᵀ + x (up down)ᵀ + bias, with a frozen pair of factors in the place of what would be added to a
    weight in full precision. In autocast it computes in autocast's precision, as a plain linear layer does.

    Args:
        linear: whose weight is quantised where it is, and whose bias is taken over.
        kind: "nf4" or "int8".
        dtype: of the frozen factors.

    Attributes:
        weight: the numbers, int8: (⌈out·in / 2⌉,) in NF4, else (out, in).
        scale: fp32; see `nf4_of` and `int8_of`.
        up, down: (out, p) and (p, in), of rank 0 until `put`.
    """

    always_fp32 = ("scale", "codes")

    def __init__(self, linear: nn.Linear, kind: str, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        device = linear.weight.device
        numbers, scale = nf4_of(linear.weight) if kind == "nf4" else int8_of(linear.weight)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias
        self.up: Tensor
        self.down: Tensor
        self.register_buffer("up", torch.zeros(self.out_features, 0, dtype=dtype, device=device), persistent=False)
        self.register_buffer("down", torch.zeros(0, self.in_features, dtype=dtype, device=device), persistent=False)
        # Both numbers of a byte, by the byte.
        codes = torch.cartesian_prod(torch.tensor(NF4), torch.tensor(NF4)).to(device) if kind == "nf4" else None
        self.codes: Tensor | None
        self.register_buffer("codes", codes, persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that the numbers stand for: (out, in)."""
        return self.out_features, self.in_features

    @torch.no_grad()
    def plain_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the layer multiplies with, without the factors: (out, in), rounded once to `dtype`."""
        if self.codes is None:
            return (self.weight * self.scale[:, None]).to(dtype)
        # The lookup takes 32-bit indices, which are half as large as those of plain indexing.
        numbers = F.embedding(self.weight.view(torch.uint8).int(), self.codes).view(-1)
        missing = -numbers.numel() % BLOCK
        blocks = (F.pad(numbers, (0, missing)) if missing else numbers).view(-1, BLOCK)
        blocks *= self.scale[:, None]
        return blocks.view(-1)[: self.out_features * self.in_features].view(self.shape).to(dtype)

    @torch.no_grad()
    def put(self, up: Tensor, down: Tensor) -> None:
        """Replaces the frozen factors, (out, p) and (p, in), in their precision and on their device."""
        # In place, though of another size: what lends these tensors knows them by themselves.
        self.up.data, self.down.data = up.to(self.up), down.to(self.down)

    def no_factors(self) -> tuple[Tensor, Tensor]:
        """A pair of rank 0, for `put`."""
        return self.up[:, :0], self.down[:0]

    def forward(self, input: Tensor) -> Tensor:
        """Returns (..., out) for (..., in), in the precision of the input or of autocast."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        result: Tensor = _Product.apply(input, bias, self)
        if self.up.shape[1]:
            pair = self.up.to(input.dtype), self.down.to(input.dtype)
            result = result + F.linear(F.linear(input, pair[1]), pair[0])
        return result


class _Product(torch.autograd.Function):
    """x Wᵀ + bias, of a weight that is made anew for the backward pass instead of being kept until then."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(input, layer.plain_weight(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]
        return gradient @ ctx.layer.plain_weight(gradient.dtype), None, None


def layers_to_quantise(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers in a model's blocks, by name.

    Those at its ends, such as embeddings and the output, stand in no list of blocks. They are few, small, and matter
    most, and stay as they are.
    """
    for name, layer in module.named_modules():
        # Subclasses may use their weight otherwise.
        if type(layer) is nn.Linear and _is_in_block(name):
            yield name, layer


@torch.no_grad()
def quantise(module: nn.Module, kind: str, device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Quantises the linear layers in a model's blocks, one at a time, in place; each is put onto the device for it.

    Args:
        kind: "nf4" or "int8".
        dtype: of the frozen factors.

    Returns:
        whether there were any.
    """
    layers = list(layers_to_quantise(module))
    found = bool(layers)
    while layers:
        name, layer = layers.pop()
        # What is mapped from a file is read here, and is not held any longer.
        layer.to(device)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, QuantisedLinear(layer, kind, dtype))
    return found


def quantised_bytes(shapes: Mapping[str, tuple[int, ...]], kind: str) -> int:
    """Bytes of a model with quantised blocks, the other tensors in fp32, from the names and shapes of its tensors."""
    return sum(_bytes_of(name, shape, kind) for name, shape in shapes.items())


def _bytes_of(name: str, shape: tuple[int, ...], kind: str) -> int:
    numbers = prod(shape)
    if not name.endswith(".weight") or len(shape) != 2 or not _is_in_block(name):
        return 4 * numbers
    return -(-numbers // 2) + 4 * -(-numbers // BLOCK) if kind == "nf4" else numbers + 4 * shape[0]


def _is_in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))
