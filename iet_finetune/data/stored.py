"""Where the encoded bytes of images are: in files, or in the rows of a table."""

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from .columnar import Indices, Numbers, Texts
from .samples import FileReader, Reader, read_file


class Stored(Protocol):
    """Encoded images in a fixed order; picklable."""

    def read(self, index: int) -> bytes:
        """Returns the encoded bytes of an image; raises a `UserError` if it cannot be read."""

    def take(self, indices: Indices) -> Self:
        """The images at `indices`, in that order."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files by their paths."""

    paths: Texts

    def read(self, index: int) -> bytes:
        """As `Stored.read`."""
        return read_file(self.paths[index])

    def take(self, indices: Indices) -> "ImageFiles":
        """As `Stored.take`."""
        return ImageFiles(self.paths.take(indices))


@dataclass(frozen=True)
class TableRows:
    """Images of a reader by their rows."""

    reader: Reader
    rows: Numbers

    def read(self, index: int) -> bytes:
        """As `Stored.read`."""
        return self.reader(self.rows[index])

    def take(self, indices: Indices) -> "TableRows":
        """As `Stored.take`."""
        return TableRows(self.reader, self.rows.take(indices))


def stored(reader: Reader, count: int) -> Stored:
    """All images of a reader; the paths of files are kept without a Python object for each."""
    if isinstance(reader, FileReader):
        return ImageFiles(Texts.of(reader.paths))
    return TableRows(reader, Numbers(np.arange(count, dtype=np.int64)))
