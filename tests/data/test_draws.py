"""Drawing from all images at once gives what drawing one after the other gives."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iet_finetune.data.columnar import Digests
from iet_finetune.data.draws import _priorities, draw_held_out, draw_subset
from iet_finetune.errors import UserError

SEEDS = st.integers(0, 2**32) | st.integers(0, 2**130)
# Some begin with zeros, which NumPy leaves out of a number.
CONTENTS = st.binary(min_size=16, max_size=16) | st.integers(0, 2**100).map(lambda number: number.to_bytes(16, "big"))


def of(contents) -> Digests:
    return Digests(np.frombuffer(b"".join(contents), np.uint8).reshape(-1, 16))


def priority(seed, purpose, content, occurrence=0):
    """Of one image."""
    words = [seed, purpose, occurrence, int.from_bytes(content, "big")]
    return tuple(np.random.SeedSequence(words).generate_state(2, np.uint64).tolist())


@st.composite
def repeated(draw):
    """Contents, some of which stand several times."""
    distinct = draw(st.lists(CONTENTS, min_size=1, max_size=12, unique=True))
    return draw(st.lists(st.sampled_from(distinct), min_size=1, max_size=30))


@given(st.lists(st.tuples(CONTENTS, st.integers(0, 2**32 - 1)), max_size=20), SEEDS, st.integers(1, 2))
def test_priorities_are_those_of_numpy(pairs, seed, purpose):
    found = _priorities(of(content for content, _ in pairs), [number for _, number in pairs], seed, purpose)
    assert list(map(tuple, found.tolist())) == [priority(seed, purpose, content, number) for content, number in pairs]


@given(repeated(), SEEDS, st.floats(0, 1, exclude_max=True))
@settings(max_examples=200)
def test_contents_are_held_out_in_random_order_as_long_as_they_fit(contents, seed, fraction):
    copies, chosen, taken = Counter(contents), set(), 0
    for content in sorted(copies, key=lambda content: priority(seed, 1, content)):
        if taken + copies[content] <= int(fraction * len(contents) + 0.5):
            chosen.add(content)
            taken += copies[content]
    if fraction and taken in (0, len(contents)):
        with pytest.raises(UserError, match=f"holds out {taken} "):
            draw_held_out(of(contents), fraction, seed)
    else:
        expected = [content in chosen for content in contents]
        assert draw_held_out(of(contents), fraction, seed).tolist() == (
            expected if fraction else [False] * len(expected)
        )


@given(repeated(), SEEDS, st.integers(0, 32))
@settings(max_examples=200)
def test_a_subset_has_the_images_that_come_first_each_copy_for_itself(contents, seed, size):
    priorities = [
        (priority(seed, 2, content, contents[:index].count(content)), index) for index, content in enumerate(contents)
    ]
    expected = sorted(index for _, index in sorted(priorities)[:size])
    assert draw_subset(of(contents), size, seed).tolist() == expected
