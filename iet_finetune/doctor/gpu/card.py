"""The card itself: what it is, and the two rates that bound everything."""

import time
from typing import Any

import torch

from ...environment import environment, has_bf16
from ..checks import Machine, expect
from ..trials import GB

# A side of the matrices, and numbers of a copy, in fp32.
_SIDE, _NUMBERS = 8192, 1 << 30
_OLDEST = (2, 9)


def card(machine: Machine, found: dict[str, Any]) -> None:
    """Its name and memory, versions, the rate of bf16 matrix products, and of copies within its memory."""
    facts = environment()
    found.update(python=facts["python"], **facts["versions"])
    expect(_version(torch.__version__) >= _OLDEST, f"torch is older than {'.'.join(map(str, _OLDEST))}")
    if not machine.has_card:
        found["processor"] = facts["processor"]
        return
    found["name"] = torch.cuda.get_device_name()
    free, total = torch.cuda.mem_get_info()
    found["memory, GB"], found["free, GB"] = total / GB, free / GB
    found["CUDA"], found["capability"] = torch.version.cuda, ".".join(map(str, torch.cuda.get_device_capability()))
    # Older cards have bf16 in software alone, which is slower than fp32.
    found["bf16"] = has_bf16(torch.device("cuda"))
    a, b = (torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found["matrix products, TFLOP/s"] = 2 * _SIDE**3 / 1e12 / _seconds(lambda: a @ b)
    if free > 10 * _NUMBERS:
        source, target = torch.randn(_NUMBERS, device="cuda"), torch.empty(_NUMBERS, device="cuda")
        found["memory, GB/s"] = 8 * _NUMBERS / GB / _seconds(lambda: target.copy_(source))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


def _seconds(function: Any) -> float:
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / 10
