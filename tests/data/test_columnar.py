"""Columns are sequences like the tuples that they stand for, and their pickles hold nothing of others."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iet_finetune.data import columnar
from iet_finetune.data.columnar import Digests, Numbers, TextLists, Texts

# Names of files may hold what is no UTF-8, which Python keeps as lone surrogates.
ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=8)
KINDS = {
    "texts": (ANY_TEXT, Texts.of),
    "lists of texts": (st.lists(ANY_TEXT, max_size=3).map(tuple), TextLists.of),
    "digests": (st.binary(min_size=16, max_size=16).map(bytes.hex), lambda texts: digests(texts)),
    "numbers": (st.integers(0, 2**62), Numbers.of),
}


def digests(texts) -> Digests:
    return Digests(np.frombuffer(b"".join(map(bytes.fromhex, texts)), np.uint8).reshape(-1, 16))


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """So few items that there are several blocks of them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(columnar, "_BLOCK", 3)
        yield


@st.composite
def columns(draw, kind):
    """A column, perhaps of items of another one, and the tuple that it stands for."""
    item, build = KINDS[kind]
    items = tuple(draw(st.lists(item, max_size=10)))
    column = build(items)
    for _ in range(draw(st.integers(0, 2))):
        chosen = draw(st.lists(st.integers(0, len(items) - 1), max_size=10)) if items else []
        items, column = tuple(items[i] for i in chosen), column.take(chosen)
    return column, items


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_column_is_a_sequence_like_the_tuple_of_its_items(kind, data):
    column, items = data.draw(columns(kind))
    assert len(column) == len(items)
    assert tuple(column) == items
    assert [column[i] for i in range(-len(items), len(items))] == [*items, *items]
    assert all(type(ours) is type(theirs) for ours, theirs in zip(column, items, strict=True))
    part = slice(*data.draw(st.tuples(*[st.none() | st.integers(-12, 12)] * 2, st.sampled_from([None, 1, 2, -1]))))
    assert column[part] == items[part]
    assert column == items
    assert items == column
    assert hash(column) == hash(items)
    assert repr(column) == repr(items)
    assert bool(column) == bool(items)
    assert column + items == items + items
    assert all(item in column and column.index(item) == items.index(item) for item in items)
    assert pickle.loads(pickle.dumps(column)) == items


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_columns_are_equal_where_their_items_are(kind, data):
    (column, items), (other, others) = data.draw(columns(kind)), data.draw(columns(kind))
    assert (column == other) is (items == others)
    assert (column == others) is (items == others)
    assert column != [*items]


@pytest.mark.parametrize("index", [3, -4])
def test_an_item_that_is_not_there_is_an_error(index):
    with pytest.raises(IndexError, match=f"item {index} of 3"):
        Texts.of("abc")[index]


def test_a_pickle_of_few_items_is_small_and_taking_them_copies_none():
    whole = Texts.of(f"{number:0100}" for number in range(10_000))
    few = whole.take(range(0, 10_000, 1000))
    assert few._values is whole._values
    assert len(pickle.dumps(whole)) > 1_000_000
    assert len(pickle.dumps(few)) < 2_000
