"""Are the gradients of attention right? Kernels have been wrong for some lengths alone."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...training.starting import leave_out_wrong_kernels
from ..checks import Machine, expect

# Of a gradient against fp32, by its own length: bf16 has 8 bits.
CLOSE = 0.02


class Shape(NamedTuple):
    """Of an attention: heads, their width, tokens that ask, tokens that are asked."""

    heads: int
    width: int
    queries: int
    keys: int


SHAPES = {
    "SD 1.5, 64 x 64": Shape(8, 40, 4096, 4096),
    "SD 1.5, 32 x 32": Shape(8, 80, 1024, 1024),
    "SD 1.5, text": Shape(8, 40, 4096, 77),
    "SDXL, 64 x 64": Shape(10, 64, 4096, 4096),
    "SD 3, 1024 px": Shape(24, 64, 4429, 4429),
    "Flux, 512 px": Shape(24, 128, 1536, 1536),
    "512 tokens": Shape(2, 16, 512, 512),
    "576 tokens": Shape(2, 64, 576, 576),
}
_SMALL = {"small": Shape(2, 16, 40, 40), "small, text": Shape(2, 16, 40, 12)}


def attention(machine: Machine, found: dict[str, Any]) -> None:
    """The worst gradient of each shape with the kernels that a run uses, laid out as diffusers does."""
    kind = torch.bfloat16 if machine.has_card else torch.float32
    if machine.has_card:
        found["cuDNN"] = torch.backends.cudnn.version()
        leave_out_wrong_kernels()
    shapes = SHAPES if machine.has_card else _SMALL
    for name, shape in shapes.items():
        inputs = [torch.randn(2, n, shape.heads, shape.width, device=machine.device) for n in
                  (shape.queries, shape.keys, shape.keys, shape.queries)]  # fmt: skip
        with sdpa_kernel(SDPBackend.MATH):
            expected = _gradients(inputs, torch.float32)
        ours = _gradients(inputs, kind)
        found[name] = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, expected, strict=True))
    wrong = [name for name in shapes if not found[name] <= CLOSE]
    expect(not wrong, f"wrong gradients: {', '.join(wrong)}")


def _gradients(inputs: list[Tensor], kind: torch.dtype) -> list[Tensor]:
    """Of queries, keys and values, in fp32; the last of the inputs is the gradient of what comes out."""
    *leaves, out = (each.detach().to(kind) for each in inputs)
    for leaf in leaves:
        leaf.requires_grad_(True)
    query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
    F.scaled_dot_product_attention(query, key, value).transpose(1, 2).backward(out)
    return [leaf.grad.float() for leaf in leaves if leaf.grad is not None]
