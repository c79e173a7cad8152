"""Are the gradients of attention right? Kernels have been wrong for some lengths alone."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import one_line
from ...training.starting import disable_cudnn_attention
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
    """The worst gradient of each shape with the kernels that a run uses, laid out as diffusers does.

    For comparison the same with cuDNN's, which runs leave out, and the times of both.
    """
    shapes = SHAPES if machine.has_card else _SMALL
    if machine.has_card:
        found["cuDNN"] = torch.backends.cudnn.version()
        disable_cudnn_attention()
    for name, shape in shapes.items():
        inputs = _inputs(machine, shape)
        with sdpa_kernel(SDPBackend.MATH):
            expected = _gradients(inputs, torch.float32)
        found[name] = _worst(_gradients(inputs, _kind(machine)), expected)
        if machine.has_card:
            found[f"{name}, ms"] = _milliseconds(inputs)
    wrong = [name for name in shapes if not found[name] <= CLOSE]
    expect(not wrong, f"wrong gradients: {', '.join(wrong)}")


def cudnn_attention(machine: Machine, found: dict[str, Any]) -> None:
    """The same with cuDNN's kernels alone, which runs leave out: says what they give, whatever that is."""
    machine.need_card()
    for name, shape in SHAPES.items():
        inputs = _inputs(machine, shape)
        with sdpa_kernel(SDPBackend.MATH):
            expected = _gradients(inputs, torch.float32)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            try:
                found[name] = _worst(_gradients(inputs, _kind(machine)), expected)
                found[f"{name}, ms"] = _milliseconds(inputs)
            except RuntimeError as error:
                found[name] = one_line(error)[:80]


def _kind(machine: Machine) -> torch.dtype:
    return torch.bfloat16 if machine.has_card else torch.float32


def _inputs(machine: Machine, shape: Shape) -> list[Tensor]:
    """Queries, keys, values, and the gradient of what comes out, fp32."""
    lengths = (shape.queries, shape.keys, shape.keys, shape.queries)
    return [torch.randn(2, length, shape.heads, shape.width, device=machine.device) for length in lengths]


def _worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of a gradient by its own length; NaN if one has any."""
    differences = [(ours - theirs).norm() / theirs.norm() for ours, theirs in zip(found, expected, strict=True)]
    return torch.stack(differences).max().item()


def _gradients(inputs: list[Tensor], kind: torch.dtype) -> list[Tensor]:
    """Of queries, keys and values, in fp32."""
    *leaves, out = (each.detach().to(kind) for each in inputs)
    for leaf in leaves:
        leaf.requires_grad_(True)
    query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
    F.scaled_dot_product_attention(query, key, value).transpose(1, 2).backward(out)
    return [leaf.grad.float() for leaf in leaves if leaf.grad is not None]


def _milliseconds(inputs: list[Tensor]) -> float:
    """Of both passes in bf16, the middle of ten."""
    times = []
    for _ in range(12):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        _gradients(inputs, torch.bfloat16)
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended))
    return sorted(times[2:])[5]
