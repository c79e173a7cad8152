"""The split is complete, disjoint and even."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iet_finetune import shard_indices
from iet_finetune.method.sharding import checked_shards


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


def test_the_shards_of_a_rule_are_put_in_order_and_refused_where_they_are_no_split():
    shards = checked_shards([[3, 0], np.array([2, 1])], 4, 2)
    assert [shard.tolist() for shard in shards] == [[0, 3], [1, 2]]
    assert all(shard.dtype == np.int64 for shard in shards)
    for parts, fault in (
        ([[0, 1, 2, 3]], "2 shards with at least one image each are wanted, not shards of 4 images"),
        ([[0, 1, 2, 3], []], "not shards of 4, 0 images"),
        ([[0, 1], [1, 2, 3]], "image 1 is in 2 shards"),
        ([[0, 1], [3]], "image 2 is in 0 shards"),
        ([[0, 1, 2], [3, 4]], "there is no image 4"),
        ([[-1, 1, 2], [3, 0]], "there is no image -1"),
    ):
        with pytest.raises(ValueError, match=fault):
            checked_shards(parts, 4, 2)
