"""Where idle tensors are on the host: in ordinary memory, pinned, or in files."""

import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..errors import UserError, disk_full, one_line
from ..files import gigabytes

# Tensors of no more numbers stay in ordinary memory: such are Adam's step counts, one a parameter.
TINY = 1 << 10
# Where a tensor may begin in a region: a cache line, which suits every dtype.
_ALIGNMENT = 64


class HostMemory:
    """Where idle tensors are on the host: in ordinary memory, in pinned memory, or in files mapped into memory.

    Tensors of up to `TINY` numbers are always in ordinary memory. A file has no name, so that nothing is left of it
    after a kill; file and pinned memory are released with the last tensor in them.

    Args:
        device: where the clones train. With a CUDA device, memory from or to which it copies is pinned.
        folder: `--offload_dir`, made if it is missing; tensors then rest in files there, which are not pinned.

    Attributes:
        in_files: whether large tensors rest in files.
        in_place: whether tensors rest where the clones train, in the ordinary memory of a CPU.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self._folder = folder
        self._pins = device.type == "cuda"
        self._in_regions = folder is not None or self._pins
        # What tensors of the device go through on their way to the host.
        self._bounce: Tensor | None = None
        self.in_files = folder is not None
        self.in_place = device.type == "cpu" and not self.in_files
        # By address. A region lives as long as the tensors in it, which hold references to it.
        self._regions: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
        if folder is not None:
            _make_writable(folder)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, *, copied: bool = True) -> Tensor:
        """An uninitialised tensor at rest; a large one has a file, or a pinned block, of its own.

        Args:
            copied: whether the device copies from or to it; what only the host computes with is not pinned.

        Raises:
            UserError: the disk behind `--offload_dir` is full, or the memory cannot be pinned.
        """
        if not copied and self._folder is None:
            return torch.empty(tuple(shape), dtype=dtype)
        return self._new([torch.empty(tuple(shape), dtype=dtype, device="meta")])[0]

    @torch.no_grad()
    def fetched(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor on the host: itself if it is there, or in memory that the next call writes over.

        From a GPU it comes through pinned memory, as large as the largest that has come so far.

        Raises:
            UserError: the memory cannot be pinned.
        """
        if not self._pins or tensor.device.type == "cpu":
            return tensor.cpu()
        if self._bounce is None or self._bounce.nbytes < tensor.nbytes:
            self._bounce = None  # first the old one goes
            self._bounce = torch.frombuffer(_pinned_memory(tensor.nbytes), dtype=torch.uint8)
        return self._bounce[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    @torch.no_grad()
    def keep(self, state: Any, into: Any = None) -> Any:
        """Lets a state rest here: dicts, lists and tuples of tensors and plain values, as an optimizer's state is.

        A tensor that rests here already changes owner: it is returned itself. Where tensors rest in place that is the
        state itself. Others are copied; those that are new share one file, or one pinned block.

        Args:
            state: is left as it is.
            into: what an earlier `keep` returned. Its tensors are written over where one of the same shape and dtype
                is at the same place of the state, so that a file does not have to be made anew each round.

        Raises:
            UserError: as for `empty`.
        """
        if self.in_place:
            return state
        new: dict[int, Tensor] = {}

        def note(tensor: Tensor, old: Any) -> Tensor:
            if not self._rests(tensor) and not _fits(old, tensor):
                new[id(tensor)] = tensor
            return tensor

        def moved(tensor: Tensor, old: Any) -> Tensor:
            if self._rests(tensor):
                return tensor
            return (old if _fits(old, tensor) else places[id(tensor)]).copy_(tensor)

        _over_tensors(note, state, into)
        places = dict(zip(new, self._new(list(new.values())), strict=True))
        return _over_tensors(moved, state, into)

    def rest(self, *states: Any) -> None:
        """Releases resident pages of tensors mapped from files; they are read from there when they are next used.

        Args:
            states: tensors, or states of them; those that are elsewhere are ignored.
        """
        if self._folder is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        regions: dict[int, mmap.mmap] = {}

        def note(tensor: Tensor, _: Any) -> Tensor:
            region = self._region_of(tensor)
            if region is not None:
                regions[id(region)] = region
            return tensor

        _over_tensors(note, states)
        for region in regions.values():
            # The mapping is shared: what was written stays in the file and the system's cache of it.
            region.madvise(mmap.MADV_DONTNEED)

    def _new(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Uninitialised tensors at rest with the shapes, dtypes and strides of others, large ones in one region."""
        total = sum(_aligned_size(tensor) for tensor in like if self._goes_to_region(tensor))
        region = self._new_region(total) if total else None
        start, tensors = 0, []
        for tensor in like:
            if region is None or not self._goes_to_region(tensor):
                tensors.append(torch.empty_like(tensor, device="cpu", requires_grad=False))
                continue
            flat = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=start)
            tensors.append(flat.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride()))
            start += _aligned_size(tensor)
        return tensors

    def _new_region(self, size: int) -> mmap.mmap:
        region = _pinned_memory(size) if self._folder is None else _mapped_file(self._folder, size)
        self._regions[_address(region)] = region
        return region

    def _goes_to_region(self, tensor: Tensor) -> bool:
        return self._in_regions and tensor.numel() > TINY

    def _rests(self, tensor: Tensor) -> bool:
        if tensor.device.type != "cpu":
            return False
        return not self._goes_to_region(tensor) or self._region_of(tensor) is not None

    def _region_of(self, tensor: Tensor) -> mmap.mmap | None:
        place = tensor.untyped_storage().data_ptr()
        return next((region for start, region in self._regions.items() if start <= place < start + len(region)), None)


def _over_tensors(function: Callable[[Tensor, Any], Tensor], state: Any, beside: Any = None) -> Any:
    """A state with function(tensor, what is at its place in `beside`) instead of each tensor."""
    if isinstance(state, Tensor):
        return function(state, beside)
    if isinstance(state, dict):
        others = beside if isinstance(beside, dict) else {}
        return {key: _over_tensors(function, value, others.get(key)) for key, value in state.items()}
    if isinstance(state, list | tuple):
        others = dict(enumerate(beside)) if isinstance(beside, list | tuple) else {}
        values = [_over_tensors(function, value, others.get(i)) for i, value in enumerate(state)]
        return getattr(type(state), "_make", type(state))(values)  # a named tuple takes its values one by one
    return state


def _fits(place: Any, tensor: Tensor) -> bool:
    return isinstance(place, Tensor) and place.shape == tensor.shape and place.dtype == tensor.dtype


def _aligned_size(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def _address(region: mmap.mmap) -> int:
    return torch.frombuffer(region, dtype=torch.uint8).data_ptr()


# --- pinned memory and files -----------------------------------------------------------------------------------------


class _PinnedMemory(mmap.mmap):
    """Memory that the GPU reads and writes directly."""

    release: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.release is not None:
            self.release()


def _pinned_memory(size: int) -> mmap.mmap:
    """Pinned memory of just this size: torch's own pinned tensors take up the next power of two, and never give back.

    It is shared with forked processes, as loader workers are: else a write after the fork could move it to other pages
    than those that the GPU knows.
    """
    runtime = torch.cuda.cudart()
    region = _PinnedMemory(-1, size)
    address = _address(region)
    # 1 is cudaHostRegisterPortable: pinned for every device.
    failure = int(runtime.cudaHostRegister(address, size, 1))
    if failure:
        raise UserError(
            f"{gigabytes(size, math.ceil)} of memory cannot be pinned for the GPU (CUDA error {failure}). Free some, "
            "or name a folder on a fast disk with `--offload_dir`."
        )
    region.release = lambda: runtime.cudaHostUnregister(address)
    return region


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_usable(folder, error) from None


def _mapped_file(folder: Path, size: int) -> mmap.mmap:
    """A file without a name, mapped into memory, whose space on the disk is taken."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        if disk_full(error):
            raise _no_room(folder, f"another {gigabytes(size, math.ceil)}", _free(folder)) from None
        raise _not_usable(folder, error) from None


def _reserve(file: IO[bytes], size: int) -> None:
    """Takes space on the disk; else a write to the mapping, with the disk full, would kill the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    zeros = bytes(min(size, 1 << 24))
    for start in range(0, size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()


def _not_usable(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or one_line(error)
    return UserError(f"`--offload_dir {folder}` cannot be written: {reason}. Choose another folder.")


def _no_room(folder: Path, needed: str, free: int) -> UserError:
    return UserError(
        f"no space left on the device for `--offload_dir {folder}`: {needed} are needed, and "
        f"{gigabytes(free, math.floor)} are free. Choose a folder on another disk."
    )


def _free(folder: Path) -> int:
    """Bytes free on the disk where a folder is, or will be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def check_offload(folder: Path, needed: int, ranks: int) -> None:
    """Compares what each rank will write with what is free on the disk behind `--offload_dir`.

    Args:
        folder: need not be there yet.
        needed: bytes a rank.
        ranks: how many of them share the disk.

    Raises:
        UserError: it is too much, or the folder cannot be reached.
    """
    try:
        free = _free(folder)
    except OSError as error:
        raise _not_usable(folder, error) from None
    if needed * ranks > free:
        raise _no_room(
            folder, gigabytes(needed * ranks, math.ceil) + (f" for {ranks} ranks" if ranks > 1 else ""), free
        )
