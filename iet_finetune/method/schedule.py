"""When each clone takes its steps, in which pass they fall, and after which of them the clones are merged."""

from collections.abc import Sequence
from dataclasses import dataclass

from .bucketing import num_steps, step_bounds


@dataclass(frozen=True)
class Step:
    """One optimizer step of a clone: the samples at positions [start, stop) of a pass."""

    number: int
    pass_: int
    start: int
    stop: int

    def micro_batches(self, size: int) -> list[range]:
        """The step's positions cut into micro-batches of `size`, the last one shorter if need be."""
        return [range(i, min(i + size, self.stop)) for i in range(self.start, self.stop, size)]


@dataclass(frozen=True)
class Schedule:
    """The steps of all clones over the whole run; everything here is counted in steps of one clone.

    Attributes:
        shard_sizes: n_k, images in each shard.
        samples_per_step: B·A; the last step of a pass is shorter.
        total_steps: steps of each clone over the run.
        round_steps: steps of each clone between two merges.
        bucket_sizes: n_kb, images of each shard in each bucket; (n_k,) where there are no buckets. A step takes its
            samples from one bucket: a pass has Σ_b ⌈n_kb/(B·A)⌉ steps, in an order drawn for each pass.
        seed: of that order.
    """

    shard_sizes: tuple[int, ...]
    samples_per_step: int
    total_steps: tuple[int, ...]
    round_steps: tuple[int, ...]
    bucket_sizes: tuple[tuple[int, ...], ...] | None = None
    seed: int = 0

    @classmethod
    def plan(
        cls,
        shard_sizes: tuple[int, ...],
        samples_per_step: int,
        *,
        num_train_epochs: int,
        merge_every_epochs: int,
        max_train_steps: int | None = None,
        total_train_steps: int | None = None,
        merge_every_steps: int | None = None,
        bucket_sizes: tuple[tuple[int, ...], ...] | None = None,
        seed: int = 0,
    ) -> "Schedule":
        """Turns passes over a shard into its steps; what is given in steps wins.

        Args:
            max_train_steps: of each clone.
            total_train_steps: of all clones together. As with passes, each clone has its share by the steps of a pass
                over its shard, so that all images are visited equally often. It is rounded up: no clone is left
                without a step, and a higher number never takes steps from a clone that has taken them already.
            bucket_sizes, seed: as the attributes; without them each step takes whatever samples come.
        """
        passes = [num_steps(sizes, samples_per_step) for sizes in bucket_sizes or [(size,) for size in shard_sizes]]
        total = [max_train_steps or num_train_epochs * steps for steps in passes]
        if total_train_steps is not None:
            total = [-(-total_train_steps * steps // sum(passes)) for steps in passes]
        merge = [merge_every_steps or merge_every_epochs * steps for steps in passes]
        return cls(shard_sizes, samples_per_step, tuple(total), tuple(merge), bucket_sizes, seed)

    @property
    def visits_a_round(self) -> int:
        """Samples that all clones together see in a round; the steps of a pass may differ in size by chance."""
        rounds = zip(range(len(self.shard_sizes)), self.shard_sizes, self.round_steps, strict=True)
        return sum(size * steps // self.steps_per_pass(shard) for shard, size, steps in rounds)

    def visits(self, shard: int) -> int:
        """How many samples a clone sees in the whole run."""
        passes, rest = divmod(self.total_steps[shard], self.steps_per_pass(shard))
        return passes * self.shard_sizes[shard] + int(self._bounds(shard, passes)[rest])

    def steps_per_pass(self, shard: int) -> int:
        """How many steps a clone takes to visit every sample of its shard once."""
        sizes = (self.shard_sizes[shard],) if self.bucket_sizes is None else self.bucket_sizes[shard]
        return num_steps(sizes, self.samples_per_step)

    def _bounds(self, shard: int, pass_: int) -> Sequence[int]:
        """Where the steps of a pass begin and, one place later, end."""
        size = self.shard_sizes[shard]
        if self.bucket_sizes is None:
            return [*range(0, size, self.samples_per_step), size]
        bounds = step_bounds(self.seed, shard, pass_, self.bucket_sizes[shard], self.samples_per_step)
        return [int(bound) for bound in bounds]

    def round_end(self, shard: int, began: int) -> int:
        """Where a clone's round ends that began at its step `began`; the last round may be shorter.

        Rounds end at multiples of their length, also after a run was made longer whose last round was short. With
        `merge_every_steps` a clone of a small shard may run out of steps before the others: it then takes no part in
        the last merges.
        """
        round_steps = self.round_steps[shard]
        return min((began // round_steps + 1) * round_steps, self.total_steps[shard])

    def remaining_rounds(self, steps: Sequence[int]) -> int:
        """Merges still to come when the clones have taken so many steps each; a round that is under way counts."""
        pairs = zip(steps, self.total_steps, self.round_steps, strict=True)
        return max(-(-total // size) - step // size if step < total else 0 for step, total, size in pairs)

    def steps(self, shard: int, start: int, stop: int) -> list[Step]:
        """A clone's steps number `start` up to `stop`; no step spans two passes."""
        steps_per_pass, found = self.steps_per_pass(shard), []
        bounds: tuple[int, Sequence[int]] = -1, ()
        for number in range(start, stop):
            pass_, index = divmod(number, steps_per_pass)
            if pass_ != bounds[0]:
                bounds = pass_, self._bounds(shard, pass_)
            found.append(Step(number, pass_, bounds[1][index], bounds[1][index + 1]))
        return found


@dataclass(frozen=True)
class Wave:
    """Clones that train at the same time, one a rank or group of ranks, and the steps they have before them.

    Attributes:
        shards: in order.
        steps: steps that each of them still takes in this round.
        before: steps that all clones of the run together had taken when the wave began.
    """

    shards: tuple[int, ...]
    steps: tuple[int, ...]
    before: int

    @property
    def length(self) -> int:
        """Steps of the clone that has most."""
        return max(self.steps)

    def total(self, taken: int) -> int:
        """Steps of all clones of the run when each clone of the wave has taken `taken` steps, or all that it has."""
        return self.before + sum(min(taken, steps) for steps in self.steps)

    def checkpoints(self, every: int) -> list[int]:
        """After how many steps in the wave the steps of all clones reach or pass a multiple of `every`."""
        totals = [self.total(taken) // every for taken in range(self.length + 1)]
        return [taken for taken in range(1, len(totals)) if totals[taken] > totals[taken - 1]]
