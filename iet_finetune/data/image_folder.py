"""Reads folders of images, with captions in tables, in text files, in folders' names or by default; loses no image."""

import gc
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..errors import UserError
from .faults import NO_CAPTION, NO_ROW, NO_VALUE, TWO_CAPTIONS, Faults
from .files import TABLE_KINDS, Files, kind_of, others_by_kind, sorted_files, text_key
from .folder_tables import ImageRow, read_texts, table_rows
from .samples import Columns, FileReader, Samples, class_of, label_of
from .text_tables import headers_of

# kohya's name of a folder: how often each of its images is visited in a pass, and what they show.
_REPEATS = re.compile(r"^(\d{1,4})_(.+)$")
IN_TABLES, IN_TEXTS, IN_FOLDERS, BY_DEFAULT = "in tables", "in text files", "by their folders", "by default"


class _Sample(NamedTuple):
    path: str
    captions: tuple[str, ...]
    label: Any
    class_: Any


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Keeps Python from going through a growing million of tuples again and again to find cycles of them."""
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()


@_no_search_for_cycles()
def read_image_folder(source: str, paths: list[str], columns: Columns, faults: Faults) -> Samples:
    """Returns one sample per row of the tables, and one per image without a row.

    The captions of an image are those of its row, else the lines of its text file, else the name of its folder if
    `columns` says so, else the default. If nothing is asked for but the images, tables and texts still say how often
    an image is in the data.

    Args:
        source: the folder's name in errors, such as "`--train_data_dir data/cats`".
        paths: the folder's files; tables name images relative to their own folder.
        columns: what to read.
        faults: is told of what is wrong with single rows and images.

    Raises:
        UserError: there are no images, or a table cannot be read or lacks a column.
    """
    files = sorted_files(paths)
    if not files.images:
        raise UserError(f"{source} has no images{_instead(files)}. Give a folder with image files.")
    if not files.tables:
        # As in `datasets`, the label is then the folder's name.
        known = ["image", "label", *([columns.caption] if columns.caption else [])]
        columns.check(known, f"{source} (without a table)")
    samples, places = _samples(files, columns, faults)
    if columns.caption is not None and not files.tables:
        _hint_at_other_tables(files, faults)
    notes = _notes(files, samples, places, columns)
    return _as_samples(_repeated(samples) if columns.from_folder else samples, columns, notes)


def _instead(files: Files) -> str:
    if not files.others:
        return ""
    return f", but {', '.join(f'{count} {kind}' for kind, count in others_by_kind(files.others))} (unpack archives)"


def _hint_at_other_tables(files: Files, faults: Faults) -> None:
    """Tells of tables that go by names that are not looked for."""
    tables = [path for path in files.others if kind_of(path) in TABLE_KINDS]
    if tables:
        name = f"metadata{kind_of(tables[0])}"
        faults.hint(f"If captions are in {headers_of(tables)}: call it {name}, with the columns file_name and text.")


def _samples(files: Files, columns: Columns, faults: Faults) -> tuple[list[_Sample], Counter[str]]:
    """The samples in order, rows first, and how many have their captions from where."""
    rows = table_rows(files, columns, faults)
    captions = _Captions(files, columns, faults)
    samples = [_of_row(row, columns, faults, captions.of(row.path, row)) for row in rows]
    named = {row.path for row in rows}
    needs_row = bool(files.tables) and (columns.caption is None or bool(columns.label) or bool(columns.class_))
    for path in files.images:
        if path not in named:
            if needs_row:
                faults.add(NO_ROW, f"`{path}`")
            samples.append(_Sample(path, captions.of(path, None), _folder_of(path), _folder_of(path)))
    return samples, captions.places


def _of_row(row: ImageRow, columns: Columns, faults: Faults, captions: tuple[str, ...]) -> _Sample:
    label = class_ = None
    try:
        if columns.label is not None:
            label = label_of(None if row.label == "" else row.label, None, row.words, columns.label)
        if columns.class_ is not None:
            class_ = class_of(row.class_, row.words, columns.class_)
    except UserError as error:
        faults.add(NO_VALUE, str(error))
    return _Sample(row.path, captions, label, class_)


class _Captions:
    """Finds the captions of images.

    Attributes:
        places: how many images have theirs from where.
    """

    def __init__(self, files: Files, columns: Columns, faults: Faults) -> None:
        self._files, self._columns, self._faults = files, columns, faults
        self.places: Counter[str] = Counter()

    def of(self, path: str, row: ImageRow | None) -> tuple[str, ...]:
        """The captions of an image; `row` is what a table says of it."""
        if self._columns.caption is None:
            return ("",)
        found = [(place, texts) for place, texts in self._sources(path, row).items() if texts is not None]
        if not found:
            self._faults.add(NO_CAPTION, f"`{path}`" if row is None else row.words)
            return ("",)
        # A blank caption stands if there is nothing better.
        place, captions = next((each for each in found if any(text.strip() for text in each[1])), found[0])
        self.places[place] += 1
        return captions

    def _sources(self, path: str, row: ImageRow | None) -> dict[str, tuple[str, ...] | None]:
        """What every place says of the image, the one that counts most first."""
        default = self._columns.default_caption
        return {
            IN_TABLES: None if row is None else row.captions,
            IN_TEXTS: self._beside(path, row) if self._files.texts else None,
            IN_FOLDERS: (_REPEATS.sub(r"\2", _folder_of(path)),) if self._columns.from_folder else None,
            BY_DEFAULT: None if default is None else (default,),
        }

    def _beside(self, path: str, row: ImageRow | None) -> tuple[str, ...] | None:
        """What the text files of an image say; the faults are told if a table says something else."""
        texts = self._files.texts.get(text_key(os.path.splitext(path)[0])) or self._files.texts.get(text_key(path))
        if texts is None:
            return None
        captions = read_texts(texts)
        if row is not None and row.captions is not None and {each.strip() for each in row.captions} != {*captions}:
            self._faults.add(TWO_CAPTIONS, f"`{path}`: {row.where} and `{os.path.basename(texts[0])}`")
        return captions


def _repeated(samples: list[_Sample]) -> list[_Sample]:
    """Each sample as often as the name of its folder says."""
    return [sample for sample in samples for _ in range(_repeats(sample.path))]


def _repeats(path: str) -> int:
    named = _REPEATS.fullmatch(_folder_of(path))
    return int(named[1]) if named else 1


def _folder_of(path: str) -> str:
    return os.path.basename(os.path.dirname(os.path.abspath(path)))


def _notes(files: Files, samples: list[_Sample], places: Counter[str], columns: Columns) -> tuple[str, ...]:
    """What was made of the folder, in lines."""
    notes = []
    if len(places) > 1 or any(place in places for place in (IN_FOLDERS, BY_DEFAULT)):
        notes.append(f"captions: {', '.join(f'{count} {place}' for place, count in places.items())}")
    folders = dict.fromkeys(os.path.dirname(sample.path) for sample in samples)
    repeats = {folder: _repeats(os.path.join(folder, "it")) for folder in folders}
    notes += [_about_repeats(folder, often, columns.from_folder) for folder, often in repeats.items() if often != 1]
    if files.other_names:
        notes.append(f"{files.other_names} links lead to images that are there by another name, and count once")
    if columns.caption is not None and (alone := _texts_alone(files)):
        notes.append(f"{alone} text files are not called like an image, and are not read")
    if files.others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others_by_kind(files.others))
        notes.append(f"files that are neither images nor captions: {kinds}")
    return tuple(notes)


def _texts_alone(files: Files) -> int:
    """How many text files belong to no image."""
    if not files.texts:
        return 0
    keys = {key for path in files.images for key in (text_key(path), text_key(os.path.splitext(path)[0]))}
    return len(files.texts.keys() - keys)


def _about_repeats(folder: str, repeats: int, honoured: bool) -> str:
    folder = os.path.basename(os.path.abspath(folder))
    if honoured:
        return f"each image of `{folder}` is in the data {repeats} times, as the folder's name says"
    return f"`--caption_from folder` would repeat each image of `{folder}` {repeats} times, as kohya's scripts do"


def _as_samples(samples: Sequence[_Sample], columns: Columns, notes: tuple[str, ...]) -> Samples:
    here = os.getcwd()
    return Samples(
        # Absolute paths survive a change of the working directory; names stay as the user wrote them.
        FileReader(tuple(path if os.path.isabs(path) else os.path.join(here, path) for path, *_ in samples)),
        tuple(sample.path for sample in samples),
        tuple(sample.captions for sample in samples),
        None if columns.label is None else tuple(str(sample.label) for sample in samples),
        None if columns.class_ is None else tuple(sample.class_ for sample in samples),
        notes=notes,
    )
