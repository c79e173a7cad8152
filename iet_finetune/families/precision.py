"""The precision of a pipeline's models: as they are stored, and fp32 where and while they compute."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

Dtypes = Mapping[str, torch.dtype]


@torch.no_grad()
def widen(module: nn.Module, but: frozenset[int] = frozenset()) -> None:
    """Puts the module's tensors into fp32, one at a time, where they are.

    Args:
        but: ids of parameters that stay as they are.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32 and id(tensor) not in but:
            tensor.data = tensor.data.float()


@contextmanager
def widened(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on the device in fp32 inside; afterwards it has the tensors again that it had before.

    They are kept meanwhile, so nothing is copied back; those mapped from a file take no memory of their own.
    """
    before = {name: tensor.data for name, tensor in _named_tensors(module)}
    home = next((tensor.device for tensor in before.values()), None)
    try:
        if home is not None:
            module.to(device)
            widen(module)
        yield
    finally:
        for name, tensor in _named_tensors(module):
            if name in before:
                tensor.data = before[name]
        if home is not None:
            module.to(home)


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
