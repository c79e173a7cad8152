"""The precision of a pipeline's models: as they are stored, and fp32 where and while they compute."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from ..environment import has_bf16

Dtypes = Mapping[str, torch.dtype]
# What autocast multiplies in, by the name of the mixed precision.
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The layers that autocast multiplies in half precision.
MULTIPLYING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What of a quantised layer is fp32 whatever its model computes in: a layer names such tensors in this attribute.
ALWAYS_FP32 = "always_fp32"


def encoding_dtype(encoder: nn.Module, device: torch.device, half: torch.dtype | None) -> torch.dtype:
    """The precision in which a text encoder computes: fp32 on a CPU; on a GPU as in diffusers' training scripts.

    There it is that of training, and where that is fp32 the one in which the encoder is held. Layers of T5 overflow in
    fp16: it computes in bf16 then, or in fp32 on a card without.

    Args:
        encoder: as it is held while it is not in use.
        half: of mixed precision; None for fp32.
    """
    if device.type == "cpu":
        return torch.float32
    held = {tensor.dtype for tensor in encoder.parameters()} & set(HALF.values())
    dtype = half or next(iter(held), torch.float32)
    if dtype == torch.float16 and getattr(encoder, "_keep_in_fp32_modules", None):
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return dtype


def planned(
    module: nn.Module, dtype: torch.dtype, *, layers_alone: bool = False
) -> Iterator[tuple[dict[str, Any], str, torch.dtype]]:
    """Of each tensor: the parameters or buffers of its layer, its name there, and the precision to compute in.

    Args:
        dtype: of the tensors with a floating point.
        layers_alone: whether all but linear and convolution layers is in fp32, as autocast has it.
    """
    for part in module.modules():
        kind = dtype if isinstance(part, MULTIPLYING) or not layers_alone else torch.float32
        exact = getattr(part, ALWAYS_FP32, ())
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    wide = torch.float32 if name in exact else kind
                    yield tensors, name, wide if tensor.is_floating_point() else tensor.dtype


@torch.no_grad()
def widen(module: nn.Module, but: frozenset[int] = frozenset()) -> None:
    """Puts the module's tensors into fp32, one at a time, where they are.

    Args:
        but: ids of parameters that stay as they are.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32 and id(tensor) not in but:
            tensor.data = tensor.data.float()


def bytes_to_compute(module: nn.Module, dtype: torch.dtype = torch.float32, *, layers_alone: bool = False) -> int:
    """Bytes of a module's tensors in the precision that `planned` says."""
    plan = planned(module, dtype, layers_alone=layers_alone)
    # Once each, also where a tensor has two names.
    return sum({tensors[name]: tensors[name].numel() * kind.itemsize for tensors, name, kind in plan}.values())


@torch.no_grad()
def send(module: nn.Module, device: torch.device, dtype: torch.dtype, *, layers_alone: bool = False) -> None:
    """Puts the module onto the device in the precision that `planned` says, one tensor at a time."""
    if dtype == torch.float32:
        module.to(device)
        widen(module)
        return
    for tensors, name, kind in planned(module, dtype, layers_alone=layers_alone):
        tensors[name].data = tensors[name].data.to(device, kind)


@contextmanager
def computing(
    module: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32, *, layers_alone: bool = False
) -> Iterator[None]:
    """The module on the device in a precision inside, as `send` does; afterwards it has its own tensors again.

    They are kept meanwhile, so nothing is copied back; those mapped from a file take no memory of their own.
    """
    before = own_tensors(module)
    home = next((tensor.device for tensor in before.values()), None)
    try:
        if home is not None:
            send(module, device, dtype, layers_alone=layers_alone)
        yield
    finally:
        give_back(module, before)
        if home is not None:
            module.to(home)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a module holds now, for `give_back`."""
    return {name: tensor.data for name, tensor in _named_tensors(module)}


def give_back(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Lets a module hold what it held before."""
    for name, tensor in _named_tensors(module):
        if name in before:
            tensor.data = before[name]


@contextmanager
def predicting(
    denoiser: nn.Module, device: torch.device, half: torch.dtype | None, *, rounds: bool = True
) -> Iterator[None]:
    """The denoiser on the device inside, in half precision or fp32; what it returns is in fp32.

    In half precision it computes as autocast does. What is computed around it, by a VAE above all, is not in autocast.

    Args:
        rounds: whether the weights of its linear and convolution layers are held in half precision, too.
    """
    with computing(denoiser, device, half if half and rounds else torch.float32, layers_alone=True):
        if half is None:
            yield
            return
        own, was_own = denoiser.forward, "forward" in denoiser.__dict__
        denoiser.forward = convert_outputs_to_fp32(torch.autocast(device.type, half)(own))
        try:
            yield
        finally:
            if was_own:
                denoiser.forward = own
            else:
                del denoiser.forward


@contextmanager
def restored(pipeline: Any) -> Iterator[None]:
    """All models of the pipeline have their tensors again afterwards, whatever is made of them inside.

    Parameters stay the same objects throughout, and only what they hold is exchanged.
    """
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    held = [(parameter, parameter.data) for module in modules for parameter in module.parameters()]
    buffers = [(each, dict(each._buffers)) for module in modules for each in module.modules()]
    try:
        yield
    finally:
        for parameter, data in held:
            parameter.data = data
        for each, before in buffers:
            each._buffers.update(before)


def round_pipeline(pipeline: Any, dtypes: Dtypes) -> None:
    """Puts each model of the pipeline into its precision, given as in `PipelineSource.dtypes`."""
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name in dtypes:
            _round(component, dtypes[name], exceptions(dtypes, name))


def exceptions(dtypes: Dtypes, name: str) -> dict[str, torch.dtype]:
    """Tensor -> precision, of those of a component that are stored in another one than most."""
    start = f"{name}/"
    return {key.removeprefix(start): dtype for key, dtype in dtypes.items() if key.startswith(start)}


def _round(module: nn.Module, dtype: torch.dtype, others: Dtypes) -> None:
    """Converts the module to a precision, and the tensors in `others` to theirs."""
    exact = {name: tensor for name, tensor in module.state_dict().items() if name in others}
    # The plain method: diffusers' own warns about layers kept in fp32, which are handled below.
    nn.Module.to(module, dtype)
    for name, tensor in _named_tensors(module):
        if name in exact:
            tensor.data = exact[name].to(others[name])


def inexact_tensors(module: nn.Module, dtype: torch.dtype, others: Dtypes) -> list[str]:
    """Names of tensors that may have been rounded where a module was loaded in the precision of most of them.

    These are exceptions that are stored in a wider precision, and tensors that are computed, not stored. If exceptions
    cannot be found under the names in the file, any tensor may be one of them.
    """
    held, stored = dict(_named_tensors(module)), module.state_dict().keys()
    half = {name for name, tensor in held.items() if tensor.dtype in (torch.float16, torch.bfloat16)}
    if not others.keys() <= held.keys():
        return sorted(half)
    return sorted(
        name
        for name in half
        if name not in stored or torch.promote_types(held[name].dtype, others.get(name, dtype)) != held[name].dtype
    )


@torch.no_grad()
def mend(module: nn.Module, names: list[str], exact: nn.Module) -> None:
    """Gives the module the tensors of these names of another one of the same kind."""
    held, theirs = dict(_named_tensors(module)), dict(_named_tensors(exact))
    for name in names:
        held[name].data = theirs[name].data


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())
