"""Safetensors files written after the pattern of others, one tensor at a time."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# torch's floating-point types in the words of safetensors.
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def write_like(source: Path, target: Path, tensor: Callable[[str], Tensor], dtype: torch.dtype | None = None) -> None:
    """A safetensors file with the tensors' names, shapes and metadata of another, and numbers of its own.

    The format: 8 bytes with the length of the header, the header in JSON, and the numbers, without a gap. One tensor
    is in memory at a time.

    Args:
        tensor: name -> its numbers, in the shape that it has in `source`, and there in the same dtype unless both are
            floating-point: then it is converted.
        dtype: of all floating-point tensors; None leaves each as it is in `source`. Then the header is the same, byte
            for byte.
    """
    header = _read_header(source)
    entries = json.loads(header)
    if dtype is not None:
        entries = _in_dtype(entries, NAMES[dtype])
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        # A multiple of 8, as safetensors itself has it.
        header = text.ljust(-(-len(text) // 8) * 8)
    entries.pop("__metadata__", None)
    with target.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
            numbers = tensor(name)
            if numbers.is_floating_point():
                numbers = numbers.to(DTYPES.get(entries[name]["dtype"], numbers.dtype))
            file.write(numbers.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def copied_like(
    source: Path, target: Path, change: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None
) -> None:
    """As `write_like`, of what `change` makes of the name and the numbers of each tensor in `source`."""
    with safe_open(source, framework="pt") as file:
        write_like(source, target, lambda name: change(name, file.get_tensor(name)), dtype)


def nbytes(path: Path) -> int:
    """Of all tensors in a safetensors file, without its header."""
    return path.stat().st_size - 8 - len(_read_header(path))


def _read_header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _in_dtype(entries: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A header's entries with all floating-point tensors in this dtype, the widest numbers first, so that all of them
    stay aligned.
    """
    tensors = {name: dict(entry) for name, entry in entries.items() if name != "__metadata__"}
    widths = {}
    for name, entry in tensors.items():
        count, (begin, end) = math.prod(entry["shape"]), entry["data_offsets"]
        if entry["dtype"] in DTYPES:
            entry["dtype"] = dtype
            widths[name] = DTYPES[dtype].itemsize
        else:
            widths[name] = (end - begin) // count if count else 1
    place, moved = 0, {key: entries[key] for key in ("__metadata__",) if key in entries}
    for name in sorted(tensors, key=lambda name: (-widths[name], name)):
        size = widths[name] * math.prod(tensors[name]["shape"])
        moved[name] = {**tensors[name], "data_offsets": [place, place + size]}
        place += size
    return moved
