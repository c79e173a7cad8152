"""The merge against a float64 average computed independently."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from iet_finetune import WeightedSum, merge_state_dicts

values = st.floats(-1e6, 1e6, width=32)
weights = st.integers(1, 2**20)


def arrays(count):
    return hnp.arrays(np.float32, (count, 7), elements=values)


@st.composite
def clones(draw):
    count = draw(st.integers(1, 12))
    return draw(arrays(count)), draw(st.lists(weights, min_size=count, max_size=count))


@given(clones())
def test_the_merge_is_the_float64_average_to_fp32_rounding(case):
    stacked, n = case
    expected = (stacked.astype(np.float64) * np.array(n)[:, None]).sum(0) / sum(n)
    merged = merge_state_dicts([{"w": torch.from_numpy(row)} for row in stacked], n)["w"].numpy()
    scale = np.abs(stacked).max() + 1e-30
    np.testing.assert_allclose(merged, expected, rtol=2**-23, atol=2**-50 * scale * len(n))


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(hnp.arrays(np.float32, 9, elements=finite), st.lists(weights, min_size=1, max_size=16))
def test_equal_clones_merge_to_themselves_bit_for_bit(clone, n):
    total = WeightedSum()
    for weight in n:
        total.add({"w": torch.from_numpy(clone)}, weight)
    np.testing.assert_array_equal(total.mean()["w"].numpy().view(np.int32), clone.view(np.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_keep_their_precision(dtype):
    states = [{"w": torch.full((3,), value, dtype=dtype)} for value in (1.0, 2.0)]
    merged = merge_state_dicts(states)["w"]
    assert merged.dtype == dtype
    assert merged.tolist() == [1.5] * 3


def test_counters_come_from_the_first_clone():
    states = [{"n": torch.tensor([7])}, {"n": torch.tensor([9])}]
    assert merge_state_dicts(states)["n"].tolist() == [7]


def test_the_clones_themselves_are_left_alone():
    first = {"w": torch.ones(3), "n": torch.tensor([1])}
    merged = merge_state_dicts([first, {"w": torch.zeros(3), "n": torch.tensor([2])}])
    merged["w"].zero_()
    merged["n"].zero_()
    assert first["w"].tolist() == [1.0] * 3
    assert first["n"].tolist() == [1]


def test_a_saved_sum_goes_on_as_if_never_interrupted():
    torch.manual_seed(0)
    states = [{"w": torch.randn(50)} for _ in range(5)]
    whole, before, after = WeightedSum(), WeightedSum(), WeightedSum()
    for weight, state in enumerate(states, start=3):
        whole.add(state, weight)
    for weight, state in enumerate(states[:3], start=3):
        before.add(state, weight)
    after.load_state_dict(before.state_dict(), before.total, states[0])
    for weight, state in enumerate(states[3:], start=6):
        after.add(state, weight)
    assert torch.equal(whole.mean()["w"], after.mean()["w"])


@pytest.mark.parametrize(
    ("states", "weights", "message"),
    [
        ([], None, "nothing"),
        ([{"w": torch.ones(1)}], [1, 2], "2"),
        ([{"w": torch.ones(1)}, {"v": torch.ones(1)}], None, "v"),
        ([{"w": torch.ones(1)}, {"w": torch.ones(2)}], None, "w has shape"),
        ([{"w": torch.ones(1)}], [0], "positive"),
        ([{"w": torch.ones(1)}], [float("nan")], "positive"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_its_name(states, weights, message):
    with pytest.raises(ValueError, match=message):
        merge_state_dicts(states, weights)
