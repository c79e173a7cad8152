"""Tries what connects the ranks before anything takes long: a wrong network is told in a minute, not after a round."""

import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from ..errors import UserError, one_line

# Seconds in which ranks that are all there must have exchanged a few numbers; connecting takes most of it.
PATIENCE = 60.0

# Renamed in torch 2.13, which warns of the old name.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def try_collectives(
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    *,
    patience: float = PATIENCE,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Exchanges a few numbers in a group in each of the ways in which training does, and looks whether they are right.

    Every rank of the group calls it at the same time.

    Args:
        device: where tensors of collectives are.
        group: None for all ranks.
        patience: in seconds.
        check: is called again and again meanwhile; raises an error where another rank has failed.

    Raises:
        UserError: they do not come through in time, or not as they were sent.
        RuntimeError: what the library of the collectives reports.
    """
    failures: list[Exception] = []

    def attempt() -> None:
        try:
            _exchange(device, group)
        except Exception as error:
            failures.append(error)

    # In a thread of its own, as connecting cannot be interrupted.
    thread, end = threading.Thread(target=attempt, daemon=True), time.monotonic() + patience
    thread.start()
    while thread.is_alive() and time.monotonic() < end:
        check()
        thread.join(0.02)
    if thread.is_alive():
        raise not_connected(device, f"not within {patience:g} s")
    for error in failures:
        raise error


def _exchange(device: torch.device, group: dist.ProcessGroup | None) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    every = torch.arange(float(size * size)).view(size, size)
    mine = every[rank].to(device)
    received, gathered = torch.empty_like(mine), mine.new_empty(size * size)
    first, total = mine.clone(), mine.clone()
    dist.all_to_all_single(received, mine, group=group)
    all_gather_single(gathered, mine, group=group)
    dist.broadcast(first, group=group, group_src=0)
    dist.all_reduce(total, group=group)
    found = (received, every[:, rank]), (gathered, every.flatten()), (first, every[0]), (total, every.sum(dim=0))
    if not all(torch.equal(ours.cpu(), expected) for ours, expected in found):
        raise not_connected(device, "other numbers come than were sent")


def not_connected(device: torch.device, reason: str | BaseException) -> UserError:
    """The ranks know of each other, but what they compute does not go from one to the other."""
    library, more = ("NCCL", "; `NCCL_DEBUG=INFO` prints what it found") if device.type == "cuda" else ("GLOO", "")
    why = reason if isinstance(reason, str) else one_line(reason).rstrip(".")
    return UserError(
        f"all ranks are there, but they cannot exchange tensors ({why}): set `{library}_SOCKET_IFNAME` to the network "
        f"interface that connects them (`lo` within one machine){more}."
    )
