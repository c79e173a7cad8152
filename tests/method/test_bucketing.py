"""Passes by bucket visit every sample once, in steps of one bucket, as the schedule says."""

from math import ceil

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from iet_finetune.method.bucketing import bucketed_order
from iet_finetune.method.schedule import Schedule

count = st.integers(1, 5)


@st.composite
def bucketed(draw):
    """Shards by the bucket of each of their samples, batch size, accumulation, and the schedule."""
    shards = draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=30), min_size=1, max_size=3))
    batch, accumulation, seed = draw(count), draw(count), draw(st.integers(0, 2**31))
    schedule = Schedule.plan(
        tuple(map(len, shards)),
        batch * accumulation,
        num_train_epochs=draw(count),
        max_train_steps=draw(st.none() | st.integers(1, 40)),
        merge_every_epochs=1,
        bucket_sizes=tuple(tuple(np.bincount(shard).tolist()) for shard in shards),
        seed=seed,
    )
    return [np.array(shard) for shard in shards], batch, accumulation, schedule


@given(bucketed())
def test_each_pass_visits_each_sample_once_in_steps_and_micro_batches_of_one_bucket(case):
    shards, batch, accumulation, schedule = case
    for number, buckets in enumerate(shards):
        steps_of_a_pass = sum(ceil(size / (batch * accumulation)) for size in np.bincount(buckets))
        assert schedule.steps_per_pass(number) == schedule.round_steps[number] == steps_of_a_pass
        passes: dict[int, list[int]] = {}
        steps = schedule.steps(number, 0, schedule.total_steps[number])
        for step in steps:
            order = bucketed_order(schedule.seed, number, step.pass_, buckets, batch * accumulation)
            parts = step.micro_batches(batch)
            members = [[int(order[position]) for position in part] for part in parts]
            assert 1 <= len(parts) <= accumulation
            assert all(1 <= len(part) <= batch for part in parts)
            assert len({buckets[member] for part in members for member in part}) == 1
            passes.setdefault(step.pass_, []).extend(member for part in members for member in part)
        assert list(passes) == list(range(len(passes)))
        *complete, last = passes.values()
        assert all(sorted(members) == list(range(len(buckets))) for members in complete)
        assert len(set(last)) == len(last)
        assert schedule.visits(number) == sum(map(len, passes.values()))
        # Whatever part of the steps is asked for, as after a stop, they are the same.
        half = len(steps) // 2
        assert schedule.steps(number, half, len(steps)) == steps[half:]


def test_samples_and_steps_are_shuffled_anew_for_each_pass_and_shard():
    buckets = np.repeat([0, 1, 2], 20)
    orders = [bucketed_order(0, shard, pass_, buckets, 4) for shard in range(2) for pass_ in range(2)]
    assert len({order.tobytes() for order in orders}) == 4
    kinds = {buckets[order].tobytes() for order in orders}
    assert len(kinds) == 4, "the steps come in another order"
    together = [frozenset(order[start : start + 4].tolist()) for order in orders for start in range(0, 60, 4)]
    assert len(set(together)) > 55, "other samples go together"


def test_a_round_is_counted_by_the_steps_of_a_pass_by_bucket():
    schedule = Schedule.plan((10, 7), 4, num_train_epochs=6, merge_every_epochs=2, bucket_sizes=((5, 5), (7,)))
    assert schedule.round_steps == (8, 4)
    assert schedule.visits_a_round == 2 * (10 + 7)
    assert [schedule.visits(shard) for shard in (0, 1)] == [60, 42]
