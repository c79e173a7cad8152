"""The ranks of a run: collectives that never hang, and the groups that train one clone together."""

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

from .coordination import Coordinator
from .placement import Placement as Placement
from .placement import gathered_places, split_sizes
from .trial import PATIENCE, all_gather_single, not_connected, try_collectives
from .watchdog import Watchdog

S = TypeVar("S", bound=Sequence[Any])


class Group:
    """The ranks that train one clone together.

    Attributes:
        size: how many ranks there are.
        member: the index of this rank among them.
        process_group: that of torch.distributed; None for a group of one.
    """

    def __init__(self, size: int = 1, member: int = 0, process_group: dist.ProcessGroup | None = None) -> None:
        self.size, self.member = size, member
        self.process_group = process_group
        # By the samples of a step's micro-batches and the device: made anew, a step would wait for the device.
        self._places: dict[tuple[Any, ...], tuple[int, Tensor]] = {}

    def all_gather(self, values: Tensor) -> Tensor:
        """Stacks the (n, m) values of all members, in member order, to (size, n, m).

        All members pass the same shape, on the device of the ranks.
        """
        if self.size == 1:
            return values[None]
        gathered = values.new_empty((self.size * len(values), *values.shape[1:]))
        all_gather_single(gathered, values.contiguous(), group=self.process_group)
        return gathered.view(self.size, *values.shape)

    def all_gather_samples(self, values: Tensor, batches: Sequence[int]) -> Tensor:
        """The values of all samples of several micro-batches, in the order in which one rank alone would have them.

        Args:
            values: (n, own), of this member's slices (see `local_slice`) of every micro-batch, one after the other.
            batches: samples in each whole micro-batch.

        Returns:
            (n, sum(batches)).
        """
        width, places = self._order(batches, values.device)
        padded = nn.functional.pad(values, (0, width - values.shape[1]))
        gathered = self.all_gather(padded).transpose(0, 1).reshape(len(values), -1)
        return gathered[:, places]

    def _order(self, batches: Sequence[int], device: torch.device) -> tuple[int, Tensor]:
        """What `gathered_places` gives, the places (sum(batches),) int64 on the device."""
        key = (*batches, device)
        if key not in self._places:
            width, places = gathered_places(batches, self.size)
            self._places[key] = width, torch.tensor(places, device=device)
        return self._places[key]

    def wrap(self, module: nn.Module) -> nn.Module:
        """Wraps the module so that every backward averages gradients over the group; a group of one returns it as is.

        All members start from the parameters of member 0.
        """
        if self.size == 1:
            return module
        device = next(module.parameters()).device
        wrapped = DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=self.process_group,
            gradient_as_bucket_view=True,
        )
        # Set afterwards: torch 2.13 deprecates the argument, and older versions lack its successor.
        wrapped.broadcast_buffers = False
        return wrapped

    def no_sync(self, module: Any) -> contextlib.AbstractContextManager[None]:
        """Accumulates gradients locally, for every micro-batch of a step but the last, as DDP's `no_sync`.

        The backward of the last micro-batch, outside this context, averages the accumulated gradients too. `module` is
        what `wrap` returned.
        """
        return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites each tensor with its sum over the members, whose tensors have the same shapes."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor, group=self.process_group)

    def sizes(self, count: int) -> list[int]:
        """Returns how many of `count` samples each member takes; the sizes differ by at most 1."""
        return split_sizes(count, self.size)

    def local_slice(self, positions: S) -> S:
        """Returns this member's slice of a micro-batch, possibly empty; all slices, in order, form the whole."""
        sizes = self.sizes(len(positions))
        start = sum(sizes[: self.member])
        return positions[start : start + sizes[self.member]]  # type: ignore[return-value]  # slicing keeps the type


class Ranks(Coordinator):
    """All ranks of a run, seen from one of them; create it with `alone` or `join`.

    Every rank calls `barrier`, `all_gather_object`, `all_to_all`, `all_gather`, `broadcast`, `group`, `connect`,
    `first_on_machine` and `leave` in the same order. They return when all ranks have called them, and raise as `check`
    does once a rank is known to be lost.

    Attributes:
        rank: the number of this rank, from 0 to size - 1.
        size: how many ranks there are.
        local_rank, local_size: the number of this rank on its machine, and how many there are on it.
        device: where tensors passed to a collective must be: the CPU for gloo, this rank's GPU for NCCL.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: torch.device | None = None,
        store: Store | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        super().__init__(rank, size, store, watchdog)
        self.device = device or torch.device("cpu")

    @classmethod
    def alone(cls) -> "Ranks":
        """The only rank of a single-process run, without torch.distributed."""
        return cls()

    @classmethod
    def join(cls, timeout: float) -> "Ranks":
        """Joins the ranks of torch.distributed's default group, if there is one; otherwise the same as `alone`.

        From here until `leave` the ranks watch each other; see `Watchdog`.

        Args:
            timeout: `--ddp_timeout`, in seconds.

        Raises:
            UserError: a rank did not join.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls.alone()
        rank, size = dist.get_rank(), dist.get_world_size()
        # Keys outlive the run and a process may train again, so each run has its own prefix.
        run = _get_default_store().add(f"iet_finetune/{rank}", 1)
        # A store handle serves one thread: one for this thread, one for the watchdog's.
        own, monitored = (PrefixStore(f"iet_finetune/run {run}", _handle()) for _ in range(2))
        ranks = cls(rank, size, _device_of_collectives(), own, Watchdog(monitored, rank, size, timeout))
        ranks._start_watchdog()
        return ranks

    def all_to_all(self, parts: Tensor, barrier: bool = True) -> Tensor:
        """Sends part r of this rank's tensor to rank r and returns the received parts by rank. Raises as `check`.

        Args:
            parts: (size * c,), contiguous, on `device`; the same c on every rank.
            barrier: wait for all ranks first. False: they are known to be here.

        Returns:
            (size * c,); on a single rank `parts` itself.
        """
        with self._collective(barrier):
            if self.size == 1:
                return parts
            received = torch.empty_like(parts)
            dist.all_to_all_single(received, parts)
            return received

    def all_gather(self, part: Tensor, barrier: bool = True) -> Tensor:
        """Concatenates the (c,) tensors of all ranks to (size * c,); on a single rank returns `part` itself.

        `part` is contiguous, on `device`, with the same c on every rank. `barrier` and errors as in `all_to_all`.
        """
        with self._collective(barrier):
            if self.size == 1:
                return part
            gathered = part.new_empty(self.size * len(part))
            all_gather_single(gathered, part)
            return gathered

    def broadcast(self, tensor: Tensor, source: int, barrier: bool = True) -> None:
        """Overwrites the tensor (contiguous, on `device`, the same shape on every rank) with that of rank `source`.

        `barrier` and errors as in `all_to_all`.
        """
        with self._collective(barrier):
            if self.size > 1:
                dist.broadcast(tensor, src=source)

    def connect(self, placement: Placement) -> Group:
        """Tries whether tensors go from rank to rank, and returns this rank's group; every rank calls it.

        Raises:
            UserError: they do not; or as `check`.
        """
        self._try(Group())  # without one of its own: all ranks
        group = self.group(placement)
        if group.size > 1:
            self._try(group)
        return group

    def _try(self, group: Group) -> None:
        if self._watchdog is None:
            return
        try:
            with self._collective(barrier=True):
                patience = min(PATIENCE, self._watchdog.timeout)
                try_collectives(self.device, group.process_group, patience=patience, check=self.check)
        except RuntimeError as error:
            raise not_connected(self.device, error) from None

    def group(self, placement: Placement, barrier: bool = True) -> Group:
        """Creates this rank's group; every rank calls it. `barrier` and errors as in `all_to_all`."""
        with self._collective(barrier):
            if placement.group_size == 1:
                return Group()
            assert self._watchdog is not None
            timeout = timedelta(seconds=self._watchdog.timeout)
            # torch.distributed requires every rank to create every group, in the same order.
            made = [dist.new_group(placement.members(s), timeout=timeout) for s in range(placement.num_shards)]
            (shard,) = placement.shards_of(self.rank)
            return Group(placement.group_size, placement.member(self.rank), made[shard])

    def _start_watchdog(self) -> None:
        assert self._watchdog is not None
        self._watchdog.start()
        local = os.environ.get("LOCAL_RANK")  # not every launcher sets it
        places = self.all_gather_object([socket.gethostname(), None if local is None else int(local)])
        host, given = places[self.rank]
        self.local_rank = sum(place[0] == host for place in places[: self.rank]) if given is None else given
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", sum(place[0] == host for place in places)))
        # If rank 0 hosts the store, it died with the store, and the next rank has to print.
        rank_0_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._watchdog.prints_without_store = self.local_rank == 0 or (
            rank_0_hosts and self.rank == self.local_rank == 1
        )

    @contextlib.contextmanager
    def _collective(self, barrier: bool) -> Iterator[None]:
        with self._failure_explained():
            if barrier and self._watchdog:
                self._barrier()
            with self.in_time():
                yield
                if self.device.type == "cuda":
                    # NCCL only queues it. Whoever asked for it waits for it next.
                    torch.cuda.current_stream(self.device).synchronize()


def _handle() -> Store:
    return _get_default_store().clone()  # type: ignore[attr-defined]  # torch's stubs leave it out


def _device_of_collectives() -> torch.device:
    if "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
