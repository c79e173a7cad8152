"""Whether the machine has the memory that a run needs on the host."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..errors import UserError
from ..files import gigabytes


@dataclass(frozen=True)
class HostNeed:
    """Bytes that a rank needs on the host, beside its pipeline, batches and libraries.

    Attributes:
        merged: what all clones start a round from.
        sums: this rank's slice of the running sums over the clones, or its share of the clones' adapters.
        outer: its slice of the outer optimizer's momentum.
        moments: optimizer moments of its resting clones.
        live: what the live clone needs beside its loaded weights, where the device is the host; else 0.
        returning: the part of `live` that rests at the end of the clone's turn. In memory it changes owner; a file
            has to be there for it as well.
    """

    merged: int
    sums: int
    outer: int
    moments: int
    live: int
    returning: int

    @property
    def resting(self) -> int:
        """Bytes in memory that need not be there with `--offload_dir`."""
        return self.merged + self.sums + self.outer + self.moments

    @property
    def total(self) -> int:
        """Bytes of memory without `--offload_dir`; with it `live` are left."""
        return self.resting + self.live

    @property
    def offloaded(self) -> int:
        """Bytes on the disk with `--offload_dir`."""
        return self.resting + self.returning


def host_need(
    *,
    weights: int,
    ranks: int,
    shards_of_rank: int,
    num_shards: int,
    ema: bool,
    moments: str,
    outer_momentum: bool,
    device_is_host: bool,
    state_bytes_per_weight_byte: float = 2.0,
    outer: bool = False,
    adapted: int = 0,
) -> HostNeed:
    """What a rank needs on the host (DESIGN rule 2).

    Args:
        weights: bytes of the trained tensors in fp32: P.
        ranks: of the run, over all machines: W. Sums are cut into W slices.
        shards_of_rank: number of clones whose moments rest with this rank.
        num_shards: K.
        ema: whether a moving average is kept and merged.
        moments: `--optimizer_across_rounds`.
        outer_momentum: whether the outer optimizer has a momentum.
        device_is_host: whether the clones train on the CPU. The live clone then needs gradients, moments and moving
            average in the same memory, but its moments are those that the rank's other clones keep resting: of
            `shards_of_rank` sets one is live.
        state_bytes_per_weight_byte: size of the optimizer's state by that of the weights: 2 for Adam, 0.5 in 8 bits.
        outer: whether the outer optimizer does anything; implied by its momentum.
        adapted: bytes of the frozen weights under LoRA adapters that are merged exactly; 0 if there are none. They
            rest as they came, beside remainders that may grow as large. Of the clones' adapters each is held once,
            and once more while they are brought together.
    """
    state = math.ceil(weights * state_bytes_per_weight_byte)
    average = state if moments == "average" else 0
    others = (weights if ema else 0) + average
    only_clone = num_shards == 1 and ranks == 1
    # In float64, so twice the size. A clone that is the only one is its own mean, unless an outer optimizer needs it.
    summed = 0 if only_clone else others
    summed += 0 if only_clone and not (outer or outer_momentum) else weights
    if adapted:
        summed = average + num_shards * (weights * (2 if ema else 1))
    copies = (3 if ema else 2) if num_shards > 1 else 0
    kept = shards_of_rank if moments == "keep" else 0
    returning = state if device_is_host and kept else 0
    return HostNeed(
        merged=weights + others + copies * adapted,
        sums=math.ceil(2 * summed / ranks),
        outer=math.ceil(weights / ranks) if outer_momentum else 0,
        moments=kept * state - returning,
        live=weights + state + (weights if ema else 0) if device_is_host else 0,
        returning=returning,
    )


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
        "let what waits lie on a fast disk with `--offload_dir`" if can_offload else "",
        "drop the clones' moments with `--optimizer_across_rounds reset`" if can_reset else "",
        f"start fewer than {ranks_on_machine} ranks on a machine" if ranks_on_machine > 1 else "",
    ]
    advice = ", or ".join(filter(None, ways)) or "use a machine with more memory"
    ranks = f" for {ranks_on_machine} ranks" if ranks_on_machine > 1 else ""
    needs, has = gigabytes(together, math.ceil), gigabytes(free, math.floor)
    raise UserError(f"training needs {needs} of memory on this machine{ranks}, and {has} are free: {advice}.")
