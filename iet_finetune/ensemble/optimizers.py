"""The optimizer and its state, and the learning-rate schedule as a function of a clone's step."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from ..config.settings import OptimizerConfig, TrainingConfig
from ..errors import UserError


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], optimizer: OptimizerConfig, training: TrainingConfig
) -> torch.optim.Optimizer:
    """AdamW with the flags' values; fused, or in 8 bits.

    Raises:
        UserError: `--use_8bit_adam` without the package bitsandbytes.
    """
    learning_rate = optimizer.learning_rate
    if optimizer.scale_lr:
        learning_rate *= training.train_batch_size * training.gradient_accumulation_steps
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (optimizer.adam_beta1, optimizer.adam_beta2),
        "weight_decay": optimizer.adam_weight_decay,
        "eps": optimizer.adam_epsilon,
    }
    if not optimizer.use_8bit_adam:
        return torch.optim.AdamW(list(parameters), fused=True, **settings)
    try:
        import bitsandbytes
    except ImportError:
        raise UserError("`--use_8bit_adam` needs bitsandbytes: `pip install bitsandbytes`.") from None
    return bitsandbytes.optim.AdamW8bit(list(parameters), **settings)


def state_bytes(weights: int, settings: OptimizerConfig) -> int:
    """Bytes of AdamW's state for parameters of `weights` bytes in fp32: two numbers each, of 8 bits if asked for."""
    return math.ceil(weights / 2) if settings.use_8bit_adam else 2 * weights


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of torch's own fused ones, whose state and mask are on the device."""
    return bool(optimizer.defaults.get("fused"))


def masked_step(optimizer: torch.optim.Optimizer, masked: Tensor) -> None:
    """One optimizer step that changes neither weights nor optimizer state where `masked` (scalar fp32) is 1.

    torch's fused optimizers read the mask on the device, as they do for gradient scalers; others have to be asked
    from the host, which waits for the device.
    """
    if is_fused(optimizer):
        optimizer.found_inf = masked  # type: ignore[attr-defined]  # set from outside by GradScaler too
        optimizer.step()
    elif not masked.item():
        optimizer.step()


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The optimizer's own state by parameter's number, as in its `state_dict()["state"]`; it changes with a step."""
    numbered = enumerate(_parameters(optimizer))
    return {index: optimizer.state[parameter] for index, parameter in numbered if parameter in optimizer.state}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]] | None) -> None:
    """Loads a state, in which the optimizer then works if it is on its device; with None it begins anew.

    That is `load_state_dict` without its copies and checks, and without waiting for a device; optimizers that are not
    torch's own do it their own way.
    """
    optimizer.state.clear()
    if not state:
        return
    if not is_fused(optimizer):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return
    for index, parameter in enumerate(_parameters(optimizer)):
        if index in state:
            optimizer.state[parameter] = _moved(state[index], parameter.device)


def _moved(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The values on a device: themselves where they are there already."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and value.device != device else value
        for name, value in values.items()
    }


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def fresh_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """AdamW's state before its first step, in the form of its `state_dict()["state"]`: all zeros."""
    return {
        index: {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
        for index, parameter in enumerate(_parameters(optimizer))
    }


def named_state(state: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a `state_dict()["state"]` as one mapping, named "parameter's number.what it is"."""
    return {f"{index}.{name}": tensor for index, own in state.items() for name, tensor in own.items()}


def state_by_parameter(named: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """What `named_state` was made from."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in named.items():
        state.setdefault(parameter_of(key), {})[key.split(".", 1)[1]] = tensor
    return state


def parameter_of(name: str) -> int:
    """The parameter's number in a name that `named_state` gave."""
    return int(name.split(".", 1)[0])


def with_counts_apart(state: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """An optimizer's state with copies of its step counts, which are in memory between its large tensors.

    Left there when the large ones go to files, they keep the C library from using the space as a whole again: without
    this, and without `malloc_trim`, 12 clones took 17 % more memory than 2 (`benchmarks/memory.py`).
    """
    return {
        index: {
            name: value.clone() if isinstance(value, Tensor) and not value.dim() else value
            for name, value in values.items()
        }
        for index, values in state.items()
    }


def learning_rate_schedule(optimizer: OptimizerConfig, total_steps: int, base: float) -> Callable[[int], float]:
    """Learning rate of a clone's step, from diffusers' schedule of that name over its `total_steps`."""
    if base == 0:
        return lambda step: 0.0
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=base)
    scheduler = get_scheduler(
        optimizer.lr_scheduler,
        stand_in,
        num_warmup_steps=optimizer.lr_warmup_steps,
        num_training_steps=total_steps,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: base * factor(step)
