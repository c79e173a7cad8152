"""What the weights files of a pipeline's components hold: precision and size, read from their headers."""

import math
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from ..errors import UserError, one_line

_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of numbers that are not integers; torch.float64 and those of 8 bits are loaded in fp32.
_OTHER_FLOATS = ("F64", "F8_E4M3", "F8_E5M2")
# Such as model.fp16.safetensors and, in parts, model.fp16-00001-of-00002.safetensors.
_OF_VARIANT = re.compile(r"\w+\.(\w+)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)")
FLOATS = (*_SAFETENSORS_DTYPES, *_OTHER_FLOATS)
# Tensor -> its precision in the words of safetensors, and its shape.
Header = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Stored:
    """The weights of a component on disk.

    Attributes:
        dtypes: tensor -> precision, of those in fp32, fp16 or bf16.
        numbers: how many numbers all tensors have.
        nbytes: bytes of all tensors.
        is_mapped: whether the files are mapped into memory when they are loaded in their own precision, so that the
            ranks of a machine share them, and the system may drop them and read them again.
        has_others: whether there are floating-point tensors in another precision.
    """

    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    numbers: int = 0
    nbytes: int = 0
    is_mapped: bool = True
    has_others: bool = False

    @property
    def loads_in(self) -> torch.dtype:
        """The precision that holds most of the tensors exactly."""
        return torch.float32 if self.has_others or not self.dtypes else most_common(self.dtypes)

    @property
    def stays_mapped(self) -> bool:
        """Whether all of it stays mapped from its files when it is loaded in its own precision."""
        return self.own_bytes == 0

    @property
    def own_bytes(self) -> int:
        """Bytes of memory that a rank takes to load it, at most; a mapped file takes none of the rank's own."""
        if self.has_others or len(set(self.dtypes.values())) > 1:
            return 4 * self.numbers
        return 0 if self.is_mapped else self.nbytes

    def __add__(self, other: "Stored") -> "Stored":
        return Stored(
            {**self.dtypes, **other.dtypes},
            self.numbers + other.numbers,
            self.nbytes + other.nbytes,
            self.is_mapped and other.is_mapped,
            self.has_others or other.has_others,
        )


def most_common(dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """The precision of most tensors."""
    return Counter(dtypes.values()).most_common(1)[0][0]


def stored_weights(folders: dict[str, Path], variant: str | None) -> dict[str, Stored]:
    """Returns what is stored of each component that has weights, from its folder.

    Raises:
        UserError: a weights file is damaged; names it.
    """
    found = {}
    for name, folder in folders.items():
        files = weight_files(folder, variant) if folder.is_dir() else []
        if files:
            found[name] = sum((_stored_in(file) for file in files), Stored())
    return found


def summary(dtypes_by_part: dict[str, dict[str, torch.dtype]]) -> dict[str, torch.dtype]:
    """Component -> precision of most tensors, component/tensor -> that of an exception.

    Components without weights are left out. T5 in fp16, for example, keeps some layers in fp32, which would overflow.
    """
    found: dict[str, torch.dtype] = {}
    for name, dtypes in dtypes_by_part.items():
        if dtypes:
            found[name] = most = most_common(dtypes)
            found |= {f"{name}/{tensor}": dtype for tensor, dtype in dtypes.items() if dtype != most}
    return found


def has_weights(folder: Path, variant: str | None) -> bool:
    """Whether the folder of a component has files of weights."""
    return bool(weight_files(folder, variant))


def only_variant(folders: Mapping[str, Path]) -> str | None:
    """The variant that components are in that have no plain weights; None where all have them or none has.

    Raises:
        UserError: there are several such variants; names them.
    """
    choices: list[set[str]] = []
    for folder in folders.values():
        if folder.is_dir() and not has_weights(folder, None):
            found = {match[1] for file in folder.iterdir() if (match := _OF_VARIANT.fullmatch(file.name))}
            choices += [found] if found else []
    if not choices:
        return None
    common = sorted(set.intersection(*choices))
    if len(common) != 1:
        every = ", ".join(sorted(set.union(*choices)))
        raise UserError(f"the weights are there as variants only ({every}): choose one with `--variant`.")
    return common[0]


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of a component's weights: safetensors, or else pickles; those of the variant where it has some."""
    for suffix in (".safetensors", ".bin"):
        files = sorted(folder.glob(f"*{suffix}"))
        chosen = [file for file in files if variant is not None and f".{variant}" in file.name]
        plain = [file for file in files if file.name.count(".") == 1]
        if chosen or plain:
            return chosen or plain
    return []


def _stored_in(file: Path) -> Stored:
    try:
        return _stored_pickled(file) if file.suffix == ".bin" else _stored_in_safetensors(file)
    except Exception as error:  # torch raises all kinds of errors, from EOFError to UnpicklingError
        raise UserError(f"`{file}` is damaged: {one_line(error).rstrip('.')}. Get the pipeline anew.") from None


def _stored_pickled(file: Path) -> Stored:
    # Files from before torch 1.6 are not archives and cannot be mapped.
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    floats = {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    return Stored(
        floats,
        sum(tensor.numel() for tensor in tensors.values()),
        sum(tensor.nbytes for tensor in tensors.values()),
        is_mapped=False,
        has_others=not set(floats.values()) <= set(_SAFETENSORS_DTYPES.values()),
    )


def _stored_in_safetensors(file: Path) -> Stored:
    return stored_of(read_header(file), file.stat().st_size)


def read_header(file: Path) -> Header:
    """The tensors of a safetensors file, none of which is read; raises whatever safetensors raises."""
    with safe_open(file, framework="pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - no mapping
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def stored_of(header: Header, nbytes: int) -> Stored:
    """What a safetensors file, or a part of one, holds."""
    return Stored(
        {name: _SAFETENSORS_DTYPES[dtype] for name, (dtype, _) in header.items() if dtype in _SAFETENSORS_DTYPES},
        sum(math.prod(shape) for _, shape in header.values()),
        nbytes,
        has_others=any(dtype in _OTHER_FLOATS for dtype, _ in header.values()),
    )
