"""The split is complete, disjoint and even."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iet_finetune import shard_indices


@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 99))
def test_every_sample_is_in_exactly_one_shard_and_sizes_differ_by_at_most_one(samples, shards, seed):
    if samples < shards:
        return
    parts = shard_indices(samples, shards, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(samples))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.sampled_from("abc"), min_size=6, max_size=60), st.integers(1, 6))
def test_stratified_shards_hold_every_label_in_equal_shares(labels, shards):
    parts = shard_indices(len(labels), shards, 0, labels)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for label in "abc":
        counts = [Counter(labels[i] for i in part)[label] for part in parts]
        assert max(counts) - min(counts) <= 1


def test_the_split_depends_on_the_seed_alone():
    one, same, other = shard_indices(40, 4, 0), shard_indices(40, 4, 0), shard_indices(40, 4, 1)
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_more_shards_than_images_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="8 shards need at least 8 samples, not 5"):
        shard_indices(5, 8, 0)
