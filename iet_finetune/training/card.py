"""A GPU that cannot train as it is asked to: one line each, before anything is loaded."""

import math
import re

import torch
from accelerate.utils import parse_flag_from_env

from ..environment import has_bf16
from ..errors import UserError, one_line, warn
from ..files import gigabytes

# What CUDA says of a card that another process has to itself, or that has failed.
_REFUSED = re.compile(r"busy or unavailable|CUDA error|no CUDA GPUs are available|device ordinal", re.IGNORECASE)


def check_driver() -> None:
    """Raises a `UserError` if there is a GPU whose driver is too old for this torch, which would use the CPU then."""
    if torch.version.cuda is None or parse_flag_from_env("ACCELERATE_USE_CPU") or torch.cuda.is_available():
        return
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        if "too old" in (reason := one_line(error)):
            what, versions = reason.split(". ")[0], f"torch {torch.__version__} is made for CUDA {torch.version.cuda}"
            raise UserError(
                f"{what}: {versions}. Update the driver, or install a torch for an older CUDA (https://pytorch.org); "
                "`ACCELERATE_USE_CPU=true` trains on the CPU."
            ) from None


def refused(error: RuntimeError) -> UserError | None:
    """The line for a card that CUDA does not give; None if the error is about something else."""
    if not _REFUSED.search(str(error)):
        return None
    return UserError(
        f"the GPU cannot be used ({one_line(error).rstrip('.')}): another process may have it to itself, or there are "
        "fewer GPUs than ranks. `nvidia-smi` shows them; choose others with `CUDA_VISIBLE_DEVICES`."
    )


def check_card(device: torch.device, precision: str) -> None:
    """Looks at the card on which this rank trains; warns if others have most of its memory.

    Args:
        device: any; only a CUDA device is looked at.
        precision: "no", "bf16" or "fp16".

    Raises:
        UserError: it is not to be had, or computes in bf16 in software alone.
    """
    if device.type != "cuda":
        return
    try:
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
    except RuntimeError as error:
        if (line := refused(error)) is None:
            raise
        raise line from None
    if precision == "bf16" and not has_bf16(device):
        raise UserError(
            f"`--mixed_precision bf16`: {name} has no bf16, which torch would imitate slowly: use `--mixed_precision "
            "fp16`."
        )
    if 2 * free < total:
        warn(
            f"only {gigabytes(free, math.floor)} of the {gigabytes(total, math.floor)} of {name} are free: other "
            "programs have the rest (`nvidia-smi` shows them)"
        )
