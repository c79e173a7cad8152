"""What a run's bits depend on besides its settings: versions, processor, threads."""

import functools
import importlib.metadata
import platform
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
