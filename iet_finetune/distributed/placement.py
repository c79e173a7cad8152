"""Which ranks train which shard: arithmetic only, no communication."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Placement:
    """How the K shards are assigned to the W ranks.

    With K >= W, rank r trains the shards r, r + W, r + 2W, ... alone, one after the other. With K < W, each shard has
    a *group* of W / K consecutive ranks. Launchers number ranks machine by machine, so a group stays on one machine
    wherever it fits.
    """

    num_shards: int
    num_ranks: int

    @classmethod
    def plan(cls, num_shards: int, num_ranks: int) -> "Placement":
        """Places `num_shards` shards on `num_ranks` ranks, both at least 1.

        Raises:
            UserError: there are more ranks than shards, and they do not divide into equal groups.
        """
        if num_shards < num_ranks and num_ranks % num_shards:
            fewer, more = nearest_num_shards(num_shards, num_ranks)
            below = num_ranks - num_ranks % num_shards
            raise UserError(
                f"`--num_shards {num_shards}` does not divide {num_ranks} ranks into equal groups: use "
                f"`--num_shards {fewer}` or {more}, or start {below} or {below + num_shards} ranks (`--num_processes` "
                "of `accelerate launch`, `--nproc_per_node` of `torchrun`)."
            )
        return cls(num_shards, num_ranks)

    @property
    def group_size(self) -> int:
        """How many ranks train one clone together."""
        return max(1, self.num_ranks // self.num_shards)

    @property
    def at_once(self) -> int:
        """How many clones train at the same time, at most."""
        return min(self.num_shards, self.num_ranks)

    @property
    def only_clone(self) -> bool:
        """Whether there is a single clone, on a single rank: nothing has to be brought together."""
        return self.num_shards == self.num_ranks == 1

    def leader(self, shard: int) -> int:
        """The first rank of the shard's group, which writes its clone."""
        return self.members(shard)[0]

    def members(self, shard: int) -> list[int]:
        """The ranks of the shard's group, ascending."""
        if self.num_shards >= self.num_ranks:
            return [shard % self.num_ranks]
        return list(range(shard * self.group_size, (shard + 1) * self.group_size))

    def shards_of(self, rank: int) -> list[int]:
        """The shards that a rank trains, alone or in a group, ascending."""
        if self.num_shards >= self.num_ranks:
            return list(range(rank, self.num_shards, self.num_ranks))
        return [rank // self.group_size]

    def member(self, rank: int) -> int:
        """The index of a rank in its group."""
        return rank % self.group_size

    def waves(self, first: int = 0) -> Iterator[list[int]]:
        """Yields the shards from `first` on, ascending, as lists of shards that train at the same time.

        No two shards of a wave share a rank. A wave holds all shards with the same k // W; the first one is shorter
        when a run on another number of ranks has already trained part of it.
        """
        while first < self.num_shards:
            end = min((first // self.num_ranks + 1) * self.num_ranks, self.num_shards)
            yield list(range(first, end))
            first = end

    def idle(self) -> list[int]:
        """The ranks without a shard in the last wave of a round, ascending."""
        if self.num_shards <= self.num_ranks or self.num_shards % self.num_ranks == 0:
            return []
        return list(range(self.num_shards % self.num_ranks, self.num_ranks))


def nearest_num_shards(num_shards: int, num_ranks: int) -> tuple[int, int]:
    """Returns the nearest numbers of shards below and above `num_shards` that fit `num_ranks` ranks.

    Requires 1 < `num_shards` < `num_ranks`; the divisors of `num_ranks` fit.
    """
    divisors = [count for count in range(1, num_ranks + 1) if num_ranks % count == 0]
    return max(d for d in divisors if d < num_shards), min(d for d in divisors if d > num_shards)


def split_sizes(count: int, size: int) -> list[int]:
    """Splits `count` items over `size` members as evenly as possible; the first members take one more."""
    return [count // size + (member < count % size) for member in range(size)]


def gathered_places(batches: Sequence[int], size: int) -> tuple[int, list[int]]:
    """Where the samples of several micro-batches are after an all_gather of what each member has of them.

    A member sends its slices (see `split_sizes`) of all micro-batches one after the other, padded to the same width.

    Args:
        batches: samples in each micro-batch.
        size: how many members split each of them.

    Returns:
        width: samples each member sends.
        places: for each sample, in the order of the micro-batches, its index in the `size * width` gathered ones.
    """
    split = [split_sizes(samples, size) for samples in batches]
    # The first member never has fewer than another.
    width = sum(sizes[0] for sizes in split)
    begins = [member * width for member in range(size)]
    places: list[int] = []
    for sizes in split:
        for member, count in enumerate(sizes):
            places += range(begins[member], begins[member] + count)
            begins[member] += count
    return width, places
