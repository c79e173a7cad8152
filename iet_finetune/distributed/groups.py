"""The ranks of a run: meeting with a timeout, exchanging tensors, and the groups that train one clone together."""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

from .meetings import Meetings
from .placement import Placement as Placement
from .placement import share_sizes
from .watch import Watch

S = TypeVar("S", bound=Sequence[Any])

# Renamed in torch 2.13, which warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group:
    """The ranks that train one clone together.

    Attributes:
        size: how many ranks there are.
        member: the index of this rank among them.
    """

    def __init__(self, size: int = 1, member: int = 0, process_group: dist.ProcessGroup | None = None) -> None:
        self.size, self.member = size, member
        self._process_group = process_group

    def gather(self, values: Tensor) -> Tensor:
        """The (n, m) values of every member, stacked in the order of the members to (size, n, m).

        The members give the same shape, on the device of the ranks.
        """
        if self.size == 1:
            return values[None]
        gathered = values.new_empty((self.size * len(values), *values.shape[1:]))
        _all_gather(gathered, values.contiguous(), group=self._process_group)
        return gathered.view(self.size, *values.shape)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the group in every backward; a group of one has it as it is.

        All members start with the parameters of member 0.
        """
        if self.size == 1:
            return module
        device = next(module.parameters()).device
        wrapped = DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=self._process_group,
            gradient_as_bucket_view=True,
        )
        # Not as an argument: from torch 2.13 on that is deprecated, and its successor is unknown before.
        wrapped.broadcast_buffers = False
        return wrapped

    def apart(self, module: Any) -> contextlib.AbstractContextManager[None]:
        """Around every micro-batch of a step but the last: gradients stay on their rank and add up.

        Those of the last, outside, are averaged with what has been added up. `module` is what `wrap` returned.
        """
        return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()

    def sizes(self, count: int) -> list[int]:
        """How many of `count` samples each member takes, by member; they differ by at most 1."""
        return share_sizes(count, self.size)

    def share_of(self, positions: S) -> S:
        """This member's slice of a micro-batch, perhaps empty; those of all members, in order, are the whole."""
        sizes = self.sizes(len(positions))
        start = sum(sizes[: self.member])
        return positions[start : start + sizes[self.member]]  # type: ignore[return-value]  # a slice is like its whole


class Ranks(Meetings):
    """All ranks of a run, as one of them sees them; made by `alone` or `join`.

    Every rank calls `meet`, `gather`, `exchange`, `share`, `broadcast`, `group`, `first_on_machine` and `leave` in the
    same order. They return when all have come, and raise what `check` raises as soon as one of them never will.

    Attributes:
        rank: the number of this rank, from 0 to size - 1.
        size: how many ranks there are.
        local_rank, local_size: the number of this rank on its machine, and how many there are on it.
        device: where the tensors given to a collective must be: the CPU for gloo, this rank's GPU for NCCL.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: torch.device | None = None,
        store: Store | None = None,
        watch: Watch | None = None,
    ) -> None:
        super().__init__(rank, size, store, watch)
        self.device = device or torch.device("cpu")

    @classmethod
    def alone(cls) -> "Ranks":
        """The only rank of a run in one process; it needs no torch.distributed."""
        return cls()

    @classmethod
    def join(cls, timeout: float) -> "Ranks":
        """The ranks of torch.distributed's default group, where every one of them joins; else this process alone.

        From here on until `leave` this rank is watched by the others and watches them: see `Watch`.

        Args:
            timeout: `--ddp_timeout`, in seconds.

        Raises:
            UserError: a rank did not come.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls.alone()
        rank, size = dist.get_rank(), dist.get_world_size()
        # Keys outlive the run, and a process may train again: each time under another prefix.
        run = _get_default_store().add(f"iet_finetune/{rank}", 1)
        # A handle of the store is for one thread: one for this, one for the watch.
        own, lookers = (PrefixStore(f"iet_finetune/run {run}", _handle()) for _ in range(2))
        ranks = cls(rank, size, _device_of_collectives(), own, Watch(lookers, rank, size, timeout))
        ranks._start_watch()
        return ranks

    def exchange(self, parts: Tensor, met: bool = False) -> Tensor:
        """Part r of this rank's tensor goes to rank r; back come the parts for this rank, by rank. Raises as `check`.

        Args:
            parts: (size * c,), contiguous, on `device`; the same c on every rank.
            met: all ranks are known to have come.

        Returns:
            (size * c,); with one rank, `parts` itself.
        """
        with self._collective(met):
            if self.size == 1:
                return parts
            received = torch.empty_like(parts)
            dist.all_to_all_single(received, parts)
            return received

    def share(self, part: Tensor, met: bool = False) -> Tensor:
        """The (c,) tensors of all ranks, one after the other: (size * c,); with one rank, `part` itself.

        `part` is contiguous and on `device`, with the same c on every rank; `met` and errors are those of `exchange`.
        """
        with self._collective(met):
            if self.size == 1:
                return part
            shared = part.new_empty(self.size * len(part))
            _all_gather(shared, part)
            return shared

    def broadcast(self, tensor: Tensor, source: int, met: bool = False) -> None:
        """Overwrite the tensor (contiguous, on `device`, the same shape everywhere) with that of rank `source`.

        `met` and errors are those of `exchange`.
        """
        with self._collective(met):
            if self.size > 1:
                dist.broadcast(tensor, src=source)

    def group(self, placement: Placement, met: bool = False) -> Group:
        """The group of this rank; every rank calls it. `met` and errors are those of `exchange`."""
        with self._collective(met):
            if placement.group_size == 1:
                return Group()
            assert self._watch is not None
            timeout = timedelta(seconds=self._watch.timeout)
            # Every rank makes every group, in the same order: torch.distributed wants it so.
            made = [dist.new_group(placement.members(s), timeout=timeout) for s in range(placement.num_shards)]
            (shard,) = placement.shards_of(self.rank)
            return Group(placement.group_size, placement.member(self.rank), made[shard])

    def _start_watch(self) -> None:
        assert self._watch is not None
        self._watch.start()
        local = os.environ.get("LOCAL_RANK")  # not every launcher says it
        places = self.gather([socket.gethostname(), None if local is None else int(local)])
        host, said = places[self.rank]
        self.local_rank = sum(place[0] == host for place in places[: self.rank]) if said is None else said
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", sum(place[0] == host for place in places)))
        # If rank 0 is the host of the store it is dead when the store is gone, and the next one must speak.
        agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._watch.speaks_alone = self.local_rank == 0 or (self.rank == self.local_rank == 1 and not agent_store)

    @contextlib.contextmanager
    def _collective(self, met: bool) -> Iterator[None]:
        with self._failure_explained():
            if not met and self._watch:
                self._meet()
            yield


def _handle() -> Store:
    return _get_default_store().clone()  # type: ignore[attr-defined]  # torch's stubs leave it out


def _device_of_collectives() -> torch.device:
    if "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
