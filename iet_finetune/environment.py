"""What a run's bits depend on besides its settings: versions, processor, threads, TF32."""

import functools
import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import __version__

PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "accelerate", "peft", "numpy")


def environment() -> dict[str, Any]:
    """Returns everything that a run's bits depend on besides its settings."""
    return {
        "versions": {"iet_finetune": __version__, **{name: _version(name) for name in PACKAGES}},
        "python": platform.python_version(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@functools.cache
def _version(package: str) -> str:
    """The installed version of a package, which is read from its files once and not for every checkpoint."""
    return importlib.metadata.version(package)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16 by itself; a CPU is not asked."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def allow_tf32() -> None:
    """Allows TF32 in matrix products on NVIDIA GPUs."""
    # By the older of torch's two flags, which sets the newer one, too. The newer one alone leaves the older behind,
    # and then torch raises an error where it reads that one itself, as when it compiles.
    torch.backends.cuda.matmul.allow_tf32 = True


def uses_tf32() -> list[bool]:
    """Whether matrix products and convolutions on NVIDIA GPUs may be rounded to TF32."""
    # By the newer flags: reading an older one raises an error where somebody has set one of the newer.
    return [place.fp32_precision == "tf32" for place in _tf32_places()[:2]]


@contextmanager
def without_tf32() -> Iterator[None]:
    """Computes in full fp32 inside, also on NVIDIA GPUs."""
    places = _tf32_places()
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def _tf32_places() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn  # torch's stubs leave these out
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Returns one line per entry that differs, for a warning."""
    flat_saved, flat_current = _flat(saved), _flat(current)
    return [
        f"{name} was {flat_saved.get(name)}, is {value}"
        for name, value in flat_current.items()
        if flat_saved.get(name) != value
    ]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    nested = values.get("versions", {})
    return {**{k: v for k, v in values.items() if k != "versions"}, **nested}
