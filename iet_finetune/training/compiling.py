"""Compiles the denoiser with torch.compile and checks that its gradients stay the same."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, one_line

# How far a gradient may be from the uncompiled one, by its own length, where it is computed in fp32 or in half.
TOLERANCE = {"no": 0.01, "bf16": 0.1, "fp16": 0.1}
# Graphs of one function, one for each width and kind of batch. With more torch would go on uncompiled.
_MOST_GRAPHS = 64
# torch's own limit for all functions together.
_MOST_IN_ALL = 256


def compile_denoiser(denoiser: nn.Module, *, backward_twice: bool = False, sizes: int = 1) -> None:
    """Compiles the denoiser in place at its next call; the names of its weights stay the same.

    A model whose class lists its repeated blocks gets diffusers' regional compilation: each kind of block is compiled
    once, in seconds where the whole model takes minutes. Weights that are overwritten in place, as those of the next
    clone are, need no new graph.

    Args:
        backward_twice: whether a graph must be kept for a second backward pass.
        sizes: how many sizes of images there may be. With several, each has a graph of its own: which one comes first
            must not decide what the others compute.
    """
    if backward_twice:
        # Otherwise the first pass overwrites what the forward pass has saved.
        torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS * sizes
    torch._dynamo.config.accumulated_recompile_limit = max(_MOST_IN_ALL, _MOST_GRAPHS * sizes)
    torch._dynamo.config.automatic_dynamic_shapes = sizes == 1
    model: Any = denoiser
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks()
    else:
        denoiser.compile()


def uncompiled() -> contextlib.AbstractContextManager[object]:
    """Runs compiled modules eagerly inside."""
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def failure_explained() -> Iterator[None]:
    """Turns a failure to compile, at the first call, into one line."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        raise UserError(f"`--compile`: torch cannot compile the denoiser: {one_line(error)}. Leave it out.") from None


def check_gradients(gradients: Callable[[], Sequence[Tensor]], tolerance: float) -> None:
    """Compares the gradients of the compiled denoiser with those of the same one uncompiled.

    torch has silently compiled networks to ones with wrong gradients, some of them all zeros.

    Args:
        gradients: computes those of all trained tensors, always from the same samples and noise.
        tolerance: the largest ‖g − g₀‖ / (‖g₀‖ + s / 10) of any tensor, s being the mean square length of all g₀.

    Raises:
        UserError: they differ, or the denoiser cannot be compiled.
    """
    with uncompiled():
        expected = [gradient.clone() for gradient in gradients()]
    with failure_explained():
        found = gradients()
    lengths = torch.stack([gradient.norm() for gradient in expected])
    differences = torch.stack([(ours - theirs).norm() for ours, theirs in zip(found, expected, strict=True)])
    worst = (differences / (lengths + lengths.square().mean().sqrt() / 10 + 1e-30)).max().item()
    if not worst <= tolerance:
        raise UserError(
            f"`--compile`: torch {torch.__version__} compiles this denoiser to one with other gradients (one of them "
            f"is {worst:.0%} off), which would learn something else: leave it out, or try another version of torch."
        )
