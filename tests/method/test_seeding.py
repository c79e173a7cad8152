"""Random draws are functions of (seed, shard, pass, position) and of nothing else."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from iet_finetune.ensemble.clone import seed_random_state
from iet_finetune.method.seeding import network_seed, pass_order, sample_draws, split_order

SHAPE = (4, 2, 2)
small = st.integers(0, 5)


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


@given(st.integers(0, 2**64), small, small, small)
def test_a_visit_always_gets_the_same_draws(seed, shard, pass_, position):
    key = (seed, shard, pass_, position, SHAPE)
    np.random.seed(0)
    first = sample_draws(*key)
    np.random.seed(1)
    assert same(first, sample_draws(*key))


@given(st.tuples(small, small, small, small), st.tuples(small, small, small, small))
def test_different_visits_get_different_draws(one, other):
    if one != other:
        assert not same(sample_draws(*one, SHAPE), sample_draws(*other, SHAPE))


def test_draws_follow_the_documented_formula():
    rng = np.random.default_rng(np.random.SeedSequence(7, spawn_key=(2, 1, 3, 5)))
    uniform = rng.random(4)
    draws = sample_draws(7, 1, 3, 5, SHAPE)
    assert [draws.flip, draws.caption, draws.caption_dropout, draws.timestep] == uniform.tolist()
    assert np.array_equal(draws.noise, rng.standard_normal(SHAPE, dtype=np.float32))
    assert np.array_equal(draws.posterior, rng.standard_normal(SHAPE, dtype=np.float32))
    assert np.array_equal(draws.offset, rng.standard_normal((4, 1, 1), dtype=np.float32))


@given(st.integers(0, 100), small, small, st.integers(1, 50))
def test_a_pass_visits_every_sample_once(seed, shard, pass_, size):
    assert sorted(pass_order(seed, shard, pass_, size)) == list(range(size))


def test_passes_shards_and_the_split_are_ordered_independently():
    orders = [pass_order(0, shard, pass_, 50).tolist() for shard in range(3) for pass_ in range(3)]
    orders.append(split_order(0, 50).tolist())
    assert len({tuple(order) for order in orders}) == len(orders)


def test_network_seeds_are_what_torch_accepts_and_differ():
    seeds = {network_seed(0, shard, round_) for shard in range(10) for round_ in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_draws_have_the_distribution_they_are_named_after():
    draws = [sample_draws(0, 0, 0, position, (4, 8, 8)) for position in range(400)]
    noise = np.stack([draw.noise for draw in draws])
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    timesteps = np.array([draw.timestep for draw in draws])
    assert np.all((timesteps >= 0) & (timesteps < 1))
    assert abs(timesteps.mean() - 0.5) < 0.05


@given(st.integers(0, 2**63 - 1))
def test_dropout_draws_as_torch_seeds_it_and_nothing_piles_up(seed):
    torch.manual_seed(seed)
    drawn = torch.rand(3)
    noted = len(torch.cuda._queued_calls)
    seed_random_state(seed)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.accelerator.is_available() or len(torch.cuda._queued_calls) == noted
