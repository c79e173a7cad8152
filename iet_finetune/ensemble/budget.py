"""What the parts of a run need in bytes, added up, and whether the machine has that memory."""

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil

from ..errors import UserError
from ..files import gigabytes


@dataclass(frozen=True)
class Need:
    """Bytes that a part of a run takes on each rank, beside the pipeline's weights, batches and libraries.

    Each part states its own where it is defined; those of all parts add up.

    Attributes:
        device: where the clones train, while one is live.
        host: idle on the host: in memory, or in files with `--offload_dir`.
        shared: the part of `host` that a clone takes to the device while it is live. Where the device is the host it
            changes owner, and is not needed twice; a file has to be there for it all the same.
        checkpoint: in the largest checkpoint, one in the middle of a round, of all ranks together.
    """

    device: int = 0
    host: int = 0
    shared: int = 0
    checkpoint: int = 0

    def __add__(self, other: "Need") -> "Need":
        return Need(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def memory(self, *, device_is_host: bool, offloaded: bool) -> int:
        """Bytes of host memory; with `--offload_dir`, only what is live on a CPU."""
        live = self.device if device_is_host else 0
        return live if offloaded else self.host + live - (self.shared if device_is_host else 0)


# --- what the machine has --------------------------------------------------------------------------------------------


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may still use: what the machine has left, and what its cgroups leave it.

    Args:
        root: where proc/ and sys/ are, for the cgroups.
    """
    machine = psutil.virtual_memory().available
    cgroups = cgroup_memory(root)
    return machine if cgroups is None else min(machine, cgroups)


def cgroup_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the limits of this process's cgroups leave, the parents' too; None where none sets a limit.

    A limit minus what is used, plus the file cache that has not been used lately: the system gives that up first. In a
    container the cgroup's own path may not be there, but the container's limits are then those at the top.
    """
    left = [_left(folder, *names) for folder, names in _cgroups(root)]
    return min((size for size in left if size is not None), default=None)


_Names = tuple[str, str, str]
_VERSION_1: _Names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2: _Names = ("memory.max", "memory.current", "inactive_file")


def _cgroups(root: Path) -> Iterator[tuple[Path, _Names]]:
    """The folders of this process's memory cgroups up to the topmost, with the names of their files."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (mount / "memory", _VERSION_1) if controllers else (mount, _VERSION_2)
        # A path with `..` leads out of what this process can see.
        parts = [] if ".." in path.split("/") else path.strip("/").split("/")
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth]), names


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    limit_text, used = _text(folder / limit).strip(), _text(folder / usage).strip()
    if not limit_text.isdigit() or not used.isdigit():
        return None
    stat = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
    return max(int(limit_text) - int(used) + int(stat.get(reclaimable, 0)), 0)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        return ""


def check_memory(needed: int, ranks_on_machine: int, *, can_offload: bool, can_reset: bool) -> None:
    """Compares what each rank needs with what this machine has.

    Args:
        needed: bytes a rank.
        ranks_on_machine: how many of them share its memory.
        can_offload: whether `--offload_dir` would help.
        can_reset: whether `--optimizer_across_rounds reset` would.

    Raises:
        UserError: it is too much; says what can be done.
    """
    together, free = needed * ranks_on_machine, available_memory()
    if together <= free:
        return
    ways = [
        "offload idle tensors to a fast disk with `--offload_dir`" if can_offload else "",
        "drop the clones' optimizer state with `--optimizer_across_rounds reset`" if can_reset else "",
        f"start fewer than {ranks_on_machine} ranks on a machine" if ranks_on_machine > 1 else "",
    ]
    advice = ", or ".join(filter(None, ways)) or "use a machine with more memory"
    ranks = f" for {ranks_on_machine} ranks" if ranks_on_machine > 1 else ""
    needs, has = gigabytes(together, math.ceil), gigabytes(free, math.floor)
    raise UserError(f"training needs {needs} of memory on this machine{ranks}, and {has} are free: {advice}.")
