"""Content hashes of images that have not changed since an earlier start, kept in the cache."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b

import PIL
import torch
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError

from .images import DECODING
from .rows import Rows

HASH_BYTES = 16
_THREADS = 8
_BLOCK = 512  # items queued for hashing at a time; only those being hashed are in memory
# A file changed this recently may change again without its time stamp moving; FAT counts in steps of two seconds.
_SETTLED_SECONDS = 2.0


def content_hash(data: bytes) -> str:
    """Returns the hexadecimal blake2b digest of 16 bytes."""
    return blake2b(data, digest_size=HASH_BYTES).hexdigest()


def file_stamp(path: str) -> str | None:
    """Returns a text that differs whenever the file's content may; None if the file is missing or just changed.

    The change time is part of it: unlike the modification time, no program can set it back.
    """
    try:
        stat = os.stat(path)
    except OSError:
        return None
    if stat.st_ctime > time.time() - _SETTLED_SECONDS:
        return None
    return f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def remembered(
    stamps: Sequence[str | None], compute: Callable[[int], str | None], source: str, cache_dir: str | None
) -> list[str | None]:
    """Returns the hash of every item; `compute` is called, on several threads, only for stamps not seen before.

    Kept by hand: `datasets` caches no map over a table in memory, and serves a named cache file for any table.
    Hashes are not kept where the cache cannot be written; the next start computes them anew.

    Args:
        stamps: identifies the content of each item; None: unknown, compute the hash and do not keep it.
        compute: returns the hash of the item at an index, `HASH_BYTES` as hexadecimal text; None if it has none.
        source: the data set; each has files of its own.
        cache_dir: `--cache_dir`; Hugging Face's assets cache if None.
    """
    rows = _open_rows(source, cache_dir)
    found: dict[int, str | None] = {}
    if rows is not None:
        places = rows.places(stamp or "" for stamp in stamps)
        found = {index: _read(rows, place) for index, place in enumerate(places) if place[0] >= 0 and stamps[index]}
    missing = [index for index in range(len(stamps)) if index not in found]
    found |= zip(missing, _computed(missing, compute), strict=True)
    new = {stamp: hash_ for i in missing if (stamp := stamps[i]) is not None and (hash_ := found[i]) is not None}
    if rows is not None and new:
        with suppress(OSError, SafetensorError):
            hashes = torch.tensor([list(bytes.fromhex(each)) for each in new.values()], dtype=torch.uint8)
            rows.add([*new], {"hash": hashes})
    return [found[index] for index in range(len(stamps))]


def _open_rows(source: str, cache_dir: str | None) -> Rows | None:
    # Another version of Pillow may refuse an image that this one can open.
    made_from = {"source": content_hash(source.encode()), "Pillow": PIL.__version__, "decoding": DECODING}
    try:
        return Rows(cached_assets_path("iet_finetune", "data", "hashes", assets_dir=cache_dir), made_from)
    except (OSError, ValueError):
        return None


def _read(rows: Rows, place: Sequence[int]) -> str:
    return bytes(rows.read(place)["hash"].tolist()).hex()


def _computed(indices: Sequence[int], compute: Callable[[int], str | None]) -> Iterator[str | None]:
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(indices), _BLOCK):
            yield from pool.map(compute, indices[start : start + _BLOCK])
