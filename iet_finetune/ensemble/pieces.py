"""The pieces of a checkpoint: files that are written only where their content has changed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """One file of a checkpoint.

    Attributes:
        version: changes whenever the content does; a file of the same version is linked, not written again.
        write: writes the content to a path.
    """

    version: str
    write: Callable[[Path], None]


def tensors_piece(version: str, tensors: Mapping[str, Tensor]) -> Piece:
    """A piece holding named tensors, as safetensors."""
    return Piece(version, lambda path: save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path))


def slice_piece(version: str, start: int, numbers: Tensor) -> Piece:
    """A piece holding the numbers (n,) from `start` on of a vector of which other ranks hold the rest."""
    facts = {"start": str(start)}
    return Piece(version, lambda path: save_file({"numbers": numbers.cpu()}, path, metadata=facts))


def state_piece(version: str, state: Any) -> Piece:
    """A piece holding nested dicts and lists of tensors and numbers, loadable without pickle's dangers."""

    def write(path: Path) -> None:
        with path.open("wb") as stream, _ctrl_c_unmasked():
            torch.save(state, stream)

    return Piece(version, write)


@contextlib.contextmanager
def _ctrl_c_unmasked() -> Iterator[None]:
    """Around `torch.save`, which finishes its file when it is interrupted, and fails at that with another error."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
