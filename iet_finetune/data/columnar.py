"""Texts, lists of texts, digests and numbers of many images as sequences, without a Python object for each of them."""

import operator
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, Self, TypeVar, overload

import numpy as np
import pyarrow as pa

T = TypeVar("T")
Indices = Sequence[int] | np.ndarray

DIGEST_BYTES = 16
_BLOCK = 4096  # items that are Python objects at a time


class Column(Sequence[T]):
    """A sequence of items that are kept in an Arrow or NumPy array and made when they are asked for.

    It equals, hashes and prints as the tuple of its items. `take` and slices share the array and copy no item; a
    pickle holds the items of the column alone.

    Args:
        values: one entry an item, or more.
        rows: (n,) int64, which entries are the column's items, in order; all of them if None.
    """

    def __init__(self, values: Any, rows: np.ndarray | None = None) -> None:
        self._values = values
        self._rows = rows

    @staticmethod
    @abstractmethod
    def _items(values: Any) -> list[T]:
        """The items as Python objects."""

    def take(self, indices: Indices) -> Self:
        """The items at `indices` (n,), in that order, none of them negative."""
        chosen = np.asarray(indices, dtype=np.int64)
        return type(self)(self._values, chosen if self._rows is None else self._rows[chosen])

    def _compact(self) -> Any:
        """The entries of the items alone."""
        return self._values if self._rows is None else _at(self._values, self._rows)

    def __len__(self) -> int:
        return len(self._values if self._rows is None else self._rows)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> T | Self:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        place = operator.index(index)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        entry = place if self._rows is None else int(self._rows[place])
        return self._items(self._values[entry : entry + 1])[0]

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), _BLOCK):
            if self._rows is None:
                yield from self._items(self._values[start : start + _BLOCK])
            else:
                yield from self._items(_at(self._values, self._rows[start : start + _BLOCK]))

    def __add__(self, other: Sequence[T]) -> tuple[T, ...]:
        return (*self, *other)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Column | tuple):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._compact(),)


class Texts(Column[str]):
    """Texts, of any characters; names of files may hold some that UTF-8 does not have."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Copies the texts."""
        return cls(_joined(([_bytes(text) for text in block] for block in _blocks(texts)), pa.large_binary()))

    @staticmethod
    def _items(values: pa.Array) -> list[str]:
        return list(map(_text, values.to_pylist()))


class TextLists(Column[tuple[str, ...]]):
    """Tuples of texts."""

    @classmethod
    def of(cls, lists: Iterable[Sequence[str]]) -> "TextLists":
        """Copies the texts of all lists."""
        blocks = ([[_bytes(text) for text in texts] for texts in block] for block in _blocks(lists))
        return cls(_joined(blocks, pa.large_list(pa.large_binary())))

    @staticmethod
    def _items(values: pa.Array) -> list[tuple[str, ...]]:
        if len(values) == 1:
            return [tuple(map(_text, values[0].as_py()))]
        # For many, much faster than `values.to_pylist()`.
        texts, ends = Texts._items(values.flatten()), np.asarray(values.offsets)
        return [tuple(texts[start:end]) for start, end in pairwise((ends - ends[0]).tolist())]


class Digests(Column[str]):
    """Digests of 16 bytes as hexadecimal texts; `values` are (n, 16) uint8."""

    @property
    def array(self) -> np.ndarray:
        """(n, 16) uint8, not to be written to."""
        return self._compact()

    @property
    def keys(self) -> np.ndarray:
        """(n,) as `keys_of`."""
        return keys_of(self.array)

    @staticmethod
    def _items(values: np.ndarray) -> list[str]:
        text = values.tobytes().hex()
        return [text[start : start + 2 * DIGEST_BYTES] for start in range(0, len(text), 2 * DIGEST_BYTES)]


class Numbers(Column[int]):
    """Whole numbers; `values` are (n,) int64."""

    @classmethod
    def of(cls, numbers: Iterable[int]) -> "Numbers":
        """Copies the numbers."""
        return cls(np.fromiter(numbers, dtype=np.int64))

    @staticmethod
    def _items(values: np.ndarray) -> list[int]:
        return values.tolist()


def keys_of(digests: np.ndarray) -> np.ndarray:
    """(n,) of dtype S16, which sorts and compares, of digests (n, 16) uint8."""
    return np.ascontiguousarray(digests).view(f"S{DIGEST_BYTES}").reshape(-1)


def _at(values: Any, rows: np.ndarray) -> Any:
    return values[rows] if isinstance(values, np.ndarray) else values.take(rows)


def _blocks(items: Iterable[T]) -> Iterator[list[T]]:
    remaining = iter(items)
    while block := list(islice(remaining, _BLOCK)):
        yield block


def _joined(blocks: Iterable[list[Any]], type_: pa.DataType) -> pa.Array:
    return pa.concat_arrays([pa.array([], type_), *(pa.array(block, type_) for block in blocks)])


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
