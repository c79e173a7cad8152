"""Steps cover every pass exactly, and rounds cover every step exactly."""

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from iet_finetune.config.settings import DEFAULT_MERGE_EPOCHS, TrainingConfig
from iet_finetune.method.schedule import Schedule, Wave

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)
count = st.integers(1, 7)


def plan(sizes, training, merge_every_epochs=DEFAULT_MERGE_EPOCHS, merge_every_steps=None):
    return Schedule.plan(
        sizes,
        training.train_batch_size * training.gradient_accumulation_steps,
        num_train_epochs=training.num_train_epochs,
        max_train_steps=training.max_train_steps,
        total_train_steps=training.total_train_steps,
        merge_every_epochs=merge_every_epochs,
        merge_every_steps=merge_every_steps,
    )


@st.composite
def schedules(draw):
    batch, accumulation = draw(count), draw(count)
    steps = draw(st.none() | st.integers(1, 60))
    training = TrainingConfig(
        train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=draw(count),
        max_train_steps=steps,
    )
    by_steps = draw(st.booleans())
    interval = {"merge_every_steps" if by_steps else "merge_every_epochs": draw(count)}
    return plan(draw(sizes), training, **interval), training


def rounds(schedule, steps):
    """The steps that each clone takes in each round, until nothing is left."""
    while schedule.remaining_rounds(steps):
        ends = [schedule.round_end(shard, step) if step < schedule.total_steps[shard] else step
                for shard, step in enumerate(steps)]  # fmt: skip
        yield list(zip(steps, ends, strict=True))
        steps = ends


@given(schedules())
def test_the_rounds_of_a_clone_are_its_steps_in_order_without_gap(case):
    schedule, _ = case
    spans = list(rounds(schedule, [0] * len(schedule.total_steps)))
    assert len(spans) == schedule.remaining_rounds([0] * len(schedule.total_steps))
    for shard, total in enumerate(schedule.total_steps):
        assert [step for span in spans for step in range(*span[shard])] == list(range(total))
        assert all(stop - start <= schedule.round_steps[shard] for start, stop in (span[shard] for span in spans))


@given(schedules())
def test_each_pass_visits_every_position_once_and_no_step_spans_two(case):
    schedule, training = case
    for shard, (size, total) in enumerate(zip(schedule.shard_sizes, schedule.total_steps, strict=True)):
        visits: dict[int, list[int]] = {}
        for step in schedule.steps(shard, 0, total):
            parts = step.micro_batches(training.train_batch_size)
            assert 1 <= len(parts) <= training.gradient_accumulation_steps
            assert all(1 <= len(part) <= training.train_batch_size for part in parts)
            visits.setdefault(step.pass_, []).extend(position for part in parts for position in part)
        complete = list(visits.values()) if training.max_train_steps is None else list(visits.values())[:-1]
        assert all(positions == list(range(size)) for positions in complete)
        if training.max_train_steps is None:
            assert len(visits) == training.num_train_epochs


def test_the_clones_merge_every_five_passes_unless_told_otherwise():
    schedule = plan((10, 11), TrainingConfig(train_batch_size=5, num_train_epochs=12))
    assert schedule.round_steps == (10, 15)
    assert schedule.total_steps == (24, 36)
    assert schedule.remaining_rounds([0, 0]) == 3
    assert schedule.remaining_rounds([10, 7]) == 3
    assert schedule.remaining_rounds([24, 36]) == 0
    assert schedule.round_end(0, 10) == 20


@given(sizes, count, st.integers(1, 500))
def test_steps_of_all_clones_are_shared_out_by_the_steps_of_a_pass(sizes, batch, total):
    of_each = plan(sizes, TrainingConfig(train_batch_size=batch, total_train_steps=total)).total_steps
    assert total <= sum(of_each) < total + len(sizes)
    passes = [math.ceil(size / batch) for size in sizes]
    for steps, a_pass in zip(of_each, passes, strict=True):
        assert steps == math.ceil(Fraction(total * a_pass, sum(passes)))
    # A longer run is one of more steps for every clone, so that it may go on from a checkpoint of the shorter one.
    longer = plan(sizes, TrainingConfig(train_batch_size=batch, total_train_steps=total + 1)).total_steps
    assert all(later >= before for before, later in zip(of_each, longer, strict=True))


def test_equal_shards_have_equal_parts_of_the_steps_of_all_clones():
    assert plan((10, 10, 10), TrainingConfig(train_batch_size=5, total_train_steps=100)).total_steps == (34, 34, 34)
    assert plan((10,), TrainingConfig(train_batch_size=5, total_train_steps=100)).total_steps == (100,)


def test_so_many_passes_and_their_steps_of_all_clones_are_the_same_run():
    passes = plan((10, 11), TrainingConfig(train_batch_size=5, num_train_epochs=12))
    assert plan((10, 11), TrainingConfig(train_batch_size=5, total_train_steps=sum(passes.total_steps))) == passes


def test_a_run_made_longer_after_a_short_last_round_goes_on_to_the_next_multiple():
    schedule = Schedule((10,), 5, (14,), (10,))
    assert schedule.round_end(0, 12) == 14
    assert Schedule((10,), 5, (30,), (10,)).round_end(0, 14) == 20


def test_merge_steps_are_counted_per_clone():
    training = TrainingConfig(train_batch_size=5, max_train_steps=20)
    schedule = plan((10, 100), training, merge_every_steps=8)
    assert list(rounds(schedule, [0, 0])) == [[(0, 8)] * 2, [(8, 16)] * 2, [(16, 20)] * 2]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(0, 100), st.integers(1, 12))
def test_checkpoints_fall_where_the_steps_of_all_clones_reach_a_multiple(steps, before, every):
    wave = Wave(tuple(range(len(steps))), tuple(steps), before)
    # One step after the other, each by all clones that have one left.
    total, expected = before, []
    for taken in range(1, max(steps) + 1):
        former = total
        total += sum(taken <= own for own in steps)
        assert wave.total(taken) == total
        if any(number % every == 0 for number in range(former + 1, total + 1)):
            expected.append(taken)
    assert wave.checkpoints(every) == expected
    assert wave.total(wave.length + 5) == before + sum(steps)
