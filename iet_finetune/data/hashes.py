"""What is known of images that have not changed since an earlier start, such as their hashes, kept in the cache."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b

import numpy as np
import PIL
import torch
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError

from .columnar import DIGEST_BYTES, keys_of
from .images import DECODING
from .rows import Rows, digests

HASH_BYTES = DIGEST_BYTES
_KEPT = "kept"
_THREADS = 8
_BLOCK = 512  # items queued for hashing at a time; only those being hashed are in memory
# A file changed this recently may change again without its time stamp moving; FAT counts in steps of two seconds.
_SETTLED_SECONDS = 2.0


def digest_of(data: bytes) -> bytes:
    """Returns the blake2b digest of 16 bytes, the content hash."""
    return blake2b(data, digest_size=HASH_BYTES).digest()


def content_hash(data: bytes) -> str:
    """Returns the content hash as hexadecimal text."""
    return digest_of(data).hex()


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


def settle(paths: Iterable[str]) -> None:
    """Waits until these files have stamps, for `_SETTLED_SECONDS` at most."""
    with suppress(OSError):
        newest = max((os.stat(path).st_ctime for path in paths), default=0.0)
        if 0 < (left := newest + _SETTLED_SECONDS - time.time()) <= _SETTLED_SECONDS:
            time.sleep(left)


def remembered(
    stamps: Iterable[str | None], compute: Callable[[int], bytes | None], size: int, source: str, cache_dir: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `compute` finds of every item; it is called, on several threads, only for stamps not seen before.

    Kept by hand: `datasets` caches no map over a table in memory, and serves a named cache file for any table.
    Nothing is kept where the cache cannot be written; the next start computes it anew. If `compute` raises for an
    item, what was found of those before it is kept.

    Args:
        stamps: identifies the content of each item; None: unknown, compute and do not keep it.
        compute: returns what is to be kept of the item at an index, `size` bytes; None if nothing is.
        source: the data set; each has files of its own.
        cache_dir: `--cache_dir`; Hugging Face's assets cache if None.

    Returns:
        (n, size) uint8, and (n,) bool, whether there is anything of an item.
    """
    keys, known = _keys(stamps)
    rows = _open_rows(source, size, cache_dir)
    found, there = np.zeros((len(keys), size), np.uint8), np.zeros_like(known)
    if rows is not None:
        places = rows.places(keys)
        there = known & (places[:, 0] >= 0)
        if there.any():
            found[there] = rows.read_all(_KEPT, places[there]).numpy()
    new = np.zeros_like(there)
    try:
        missing = np.flatnonzero(~there).tolist()
        for index, each in zip(missing, _computed(missing, compute), strict=True):
            if each is not None:
                found[index], new[index] = np.frombuffer(each, dtype=np.uint8), True
    finally:
        if rows is not None:
            _keep(rows, keys, found, np.flatnonzero(new & known))
    return found, there | new


def _keys(stamps: Iterable[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """(n, 16) uint8, what stands for each stamp in the cache, and (n,) bool, whether there is a stamp."""
    known = bytearray()

    def texts() -> Iterator[str]:
        for stamp in stamps:
            known.append(stamp is not None)
            yield stamp or ""

    return digests(texts()), np.frombuffer(known, dtype=bool)


def _keep(rows: Rows, keys: np.ndarray, found: np.ndarray, new: np.ndarray) -> None:
    new = new[np.unique(keys_of(keys[new]), return_index=True)[1]]
    if len(new):
        with suppress(OSError, SafetensorError):
            rows.add(keys[new], {_KEPT: torch.from_numpy(found[new])})


def _open_rows(source: str, size: int, cache_dir: str | None) -> Rows | None:
    # Another version of Pillow, or of how we use it, may refuse an image that this one can decode.
    made_from = {"source": digest_of(source.encode()).hex(), "size": size, "Pillow": PIL.__version__}
    made_from["decoding"] = DECODING
    try:
        return Rows(cached_assets_path("iet_finetune", "data", "hashes", assets_dir=cache_dir), made_from)
    except (OSError, ValueError):
        return None


def _computed(indices: Sequence[int], compute: Callable[[int], bytes | None]) -> Iterator[bytes | None]:
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(indices), _BLOCK):
            yield from pool.map(compute, indices[start : start + _BLOCK])
