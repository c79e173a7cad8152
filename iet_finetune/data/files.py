"""The files of a folder, each once: which are pictures, which hold captions, and which are neither."""

import importlib
import os
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import PIL.Image

# What Pillow opens but cannot draw, or only with another program.
_NO_PICTURES = frozenset((".bufr", ".emf", ".eps", ".grib", ".h5", ".hdf", ".mpeg", ".mpg", ".ps", ".wmf"))
# Pictures that Pillow opens with a plug-in, or not at all. They count, so that none is left out silently.
_PLUG_INS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif", ".jxl": "pillow-jxl-plugin",
             ".avif": "pillow-avif-plugin"}  # fmt: skip
_UNREADABLE = frozenset((".arw", ".cr2", ".cr3", ".dng", ".exr", ".hdr", ".jxr", ".nef", ".orf", ".raf", ".raw",
                         ".rw2", ".svg", ".svgz"))  # fmt: skip
TABLE_STEMS, TABLE_KINDS = ("metadata", "captions"), (".csv", ".tsv", ".jsonl", ".json", ".parquet")
TEXT_KINDS = (".txt", ".caption")
# Not looked into for a picture without an extension that says so.
_KNOWN_OTHERS = frozenset(
    (*TABLE_KINDS, *TEXT_KINDS, ".7z", ".avi", ".db", ".gz", ".html", ".ini", ".lock", ".log", ".md", ".mkv", ".mov",
     ".mp4", ".npy", ".npz", ".pdf", ".pt", ".py", ".rar", ".safetensors", ".tar", ".toml", ".webm", ".xml", ".xmp",
     ".yaml", ".yml", ".zip")
)  # fmt: skip


@dataclass(frozen=True)
class Files:
    """The files of a folder by what they are, in a fixed order.

    Attributes:
        images, tables, others: their paths; tables hold captions of many images.
        texts: paths of text files by `text_key`: captions of the image of the same name.
        kept: the path under which each image is known, by every normalised path that leads to it.
    """

    images: list[str]
    tables: list[str]
    texts: dict[str, list[str]]
    others: list[str]
    kept: dict[str, str]

    @property
    def other_names(self) -> int:
        """How many further names lead to images that are counted under another one."""
        return len(self.kept) - len(self.images)


def sorted_files(paths: list[str]) -> Files:
    """Tells the files apart; a picture that links lead to by several names counts once, under its own."""
    files = Files([], [], {}, [], {})
    pictures, kinds = [], picture_kinds()
    for path in paths:
        kind = kind_of(path)
        if kind in kinds:
            pictures.append(path)
        elif is_table(path):
            files.tables.append(path)
        elif kind in TEXT_KINDS:
            files.texts.setdefault(text_key(os.path.splitext(path)[0]), []).append(path)
        elif is_image(path):
            pictures.append(path)
        else:
            files.others.append(path)
    real = {os.path.realpath(path): path for path in reversed(pictures) if os.path.islink(path)}
    real |= {os.path.realpath(path): path for path in pictures if not os.path.islink(path)} if real else {}
    for path in pictures:
        kept = real[os.path.realpath(path)] if real else path
        files.kept[os.path.normpath(path)] = kept
        if kept == path:
            files.images.append(path)
    return files


def find_files(folder: str) -> list[str]:
    """Returns every file below a folder in a fixed order, except hidden ones, which `datasets` skips too.

    Folders that links lead to are read where they are first met, and once.
    """
    found, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if is_visible(name) and _is_new(parent, name, seen)]
        start = os.path.join(parent, "")
        found += [start + name for name in sorted(names) if is_visible(name)]
    return found


def is_visible(name: str) -> bool:
    """Whether a file or folder of this name is looked at."""
    return not name.startswith((".", "__"))


def _is_new(parent: str, name: str, seen: set[str]) -> bool:
    """Whether no way has led to this folder yet; marks it as seen."""
    real = os.path.realpath(os.path.join(parent, name))
    is_new = real not in seen
    seen.add(real)
    return is_new


def kind_of(path: str) -> str:
    """A file's extension, in small letters."""
    return os.path.splitext(path)[1].lower()


def is_table(path: str) -> bool:
    """Whether a file holds captions of many images, judging by its name."""
    stem, kind = os.path.splitext(os.path.basename(path).lower())
    return stem in TABLE_STEMS and kind in TABLE_KINDS


def text_key(path: str) -> str:
    """What the names of an image, less its extension, and of its text file have in common."""
    return unicodedata.normalize("NFC", os.path.normpath(path))


def is_image(path: str) -> bool:
    """Whether a file is a picture: by its extension, or by its first bytes where that says nothing."""
    kind = kind_of(path)
    return kind in picture_kinds() or (kind not in _KNOWN_OTHERS and _opens(path))


def has_captions(paths: list[str]) -> bool:
    """Whether there are tables, or text files that are called like an image."""
    texts = {text_key(os.path.splitext(path)[0]) for path in paths if kind_of(path) in TEXT_KINDS}
    return any(is_table(path) or (text_key(os.path.splitext(path)[0]) in texts and is_image(path)) for path in paths)


def _opens(path: str) -> bool:
    with suppress(Exception), PIL.Image.open(path) as image:  # decoders raise all kinds of errors
        return bool(image.format)
    return False


@cache
def picture_kinds() -> frozenset[str]:
    """The extensions of pictures, those included that cannot be read here."""
    load_plug_ins()
    opened = {kind for kind, format_ in PIL.Image.registered_extensions().items() if format_ in PIL.Image.OPEN}
    return frozenset(opened - _NO_PICTURES) | _UNREADABLE | _PLUG_INS.keys()


@cache
def load_plug_ins() -> None:
    """Loads Pillow's decoders, and those of the plug-ins that are installed."""
    PIL.Image.init()
    for module, registers in (("pillow_heif", "register_heif_opener"), ("pillow_jxl", None), ("pillow_avif", None)):
        with suppress(ImportError):
            plug_in = importlib.import_module(module)
            if registers is not None:
                getattr(plug_in, registers)()


def why_unreadable(path: str) -> str | None:
    """What is known of a picture that Pillow cannot open, from its name; None if nothing."""
    kind = kind_of(path)
    if kind in _PLUG_INS:
        return f"Pillow reads {kind} with `pip install {_PLUG_INS[kind]}`"
    return f"Pillow does not read {kind}: convert it to PNG" if kind in _UNREADABLE else None


def others_by_kind(paths: list[str]) -> Iterator[tuple[str, int]]:
    """The extensions of files and how many have each, the most frequent first."""
    counts: dict[str, int] = {}
    for path in paths:
        kind = kind_of(path) or "without extension"
        counts[kind] = counts.get(kind, 0) + 1
    yield from sorted(counts.items(), key=lambda each: (-each[1], each[0]))
