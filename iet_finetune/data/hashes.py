"""Content hashes of images that have not changed since an earlier start, kept in the cache."""

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

from .columnar import DIGEST_BYTES, Digests, keys_of
from .rows import Rows, digests

HASH_BYTES = DIGEST_BYTES
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


def settle(paths: Iterable[str]) -> None:
    """Waits until these files have stamps, for `_SETTLED_SECONDS` at most."""
    with suppress(OSError):
        newest = max((os.stat(path).st_ctime for path in paths), default=0.0)
        if 0 < (left := newest + _SETTLED_SECONDS - time.time()) <= _SETTLED_SECONDS:
            time.sleep(left)


def remembered(
    stamps: Iterable[str | None], compute: Callable[[int], str], source: str, cache_dir: str | None
) -> Digests:
    """Returns the hash of every item; `compute` is called, on several threads, only for stamps not seen before.

    Kept by hand: `datasets` caches no map over a table in memory, and serves a named cache file for any table.
    Hashes are not kept where the cache cannot be written; the next start computes them anew. If `compute` fails for
    an item, the hashes of those before it are kept.

    Args:
        stamps: identifies the content of each item; None: unknown, compute the hash and do not keep it.
        compute: returns the hash of the item at an index, `HASH_BYTES` as hexadecimal text.
        source: the data set; each has files of its own.
        cache_dir: `--cache_dir`; Hugging Face's assets cache if None.
    """
    keys, known = _keys(stamps)
    rows = _open_rows(source, cache_dir)
    hashes, there = np.zeros_like(keys), np.zeros_like(known)
    if rows is not None:
        places = rows.places(keys)
        there = known & (places[:, 0] >= 0)
        if there.any():
            hashes[there] = rows.read_all("hash", places[there]).numpy()
    missing, done = np.flatnonzero(~there), 0
    try:
        for index, found in zip(missing, _computed(missing.tolist(), compute), strict=True):
            hashes[index] = np.frombuffer(bytes.fromhex(found), dtype=np.uint8)
            done += 1
    finally:
        new = missing[:done]
        if rows is not None:
            _keep(rows, keys, hashes, new[known[new]])
    return Digests(hashes)


def _keys(stamps: Iterable[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """(n, 16) uint8, what stands for each stamp in the cache, and (n,) bool, whether there is a stamp."""
    known = bytearray()

    def texts() -> Iterator[str]:
        for stamp in stamps:
            known.append(stamp is not None)
            yield stamp or ""

    return digests(texts()), np.frombuffer(known, dtype=bool)


def _keep(rows: Rows, keys: np.ndarray, hashes: np.ndarray, new: np.ndarray) -> None:
    new = new[np.unique(keys_of(keys[new]), return_index=True)[1]]
    if len(new):
        with suppress(OSError, SafetensorError):
            rows.add(keys[new], {"hash": torch.from_numpy(hashes[new])})


def _open_rows(source: str, cache_dir: str | None) -> Rows | None:
    # Another version of Pillow may refuse an image that this one can open.
    made_from = {"source": content_hash(source.encode()), "Pillow": PIL.__version__}
    try:
        return Rows(cached_assets_path("iet_finetune", "data", "hashes", assets_dir=cache_dir), made_from)
    except (OSError, ValueError):
        return None


def _computed(indices: Sequence[int], compute: Callable[[int], str]) -> Iterator[str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(indices), _BLOCK):
            yield from pool.map(compute, indices[start : start + _BLOCK])
