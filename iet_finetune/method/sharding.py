"""How the data is split into shards: disjoint, complete, and as even as possible."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from .seeding import split_order


def shard_indices(
    num_samples: int, num_shards: int, seed: int, labels: Sequence[str] | None = None
) -> tuple[np.ndarray, ...]:
    """The samples of each shard, ascending, as int64 arrays.

    The samples are shuffled, ordered by label if there are labels (stratified), and dealt out in turn: so the sizes of
    two shards differ by at most 1, and so do their counts of each label.

    Raises:
        ValueError: fewer samples than shards.
    """
    if num_samples < num_shards:
        raise ValueError(f"{num_shards} shards need at least {num_shards} samples, not {num_samples}.")
    order = split_order(seed, num_samples)
    if labels is not None:
        order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    return tuple(np.sort(order[shard::num_shards]) for shard in range(num_shards))


class Images(Protocol):
    """What a sharding sees of the training images: at least their number, and a label each if they have any."""

    shard_labels: Sequence[str] | None

    def __len__(self) -> int: ...


def iid(images: Images, num_shards: int, seed: int) -> tuple[np.ndarray, ...]:
    """At random; see `shard_indices`."""
    return shard_indices(len(images), num_shards, seed)


def stratified(images: Images, num_shards: int, seed: int) -> tuple[np.ndarray, ...]:
    """At random, each label spread evenly over the shards; see `shard_indices`."""
    return shard_indices(len(images), num_shards, seed, images.shard_labels)


def checked_shards(parts: Sequence[ArrayLike], num_samples: int, num_shards: int) -> tuple[np.ndarray, ...]:
    """The shards that a rule made, ascending, as int64 arrays.

    Raises:
        ValueError: not so many shards, an empty one, or a sample that is in none of them or in several.
    """
    shards = tuple(np.sort(np.asarray(part, dtype=np.int64)) for part in parts)
    if len(shards) != num_shards or not all(map(len, shards)):
        sizes = ", ".join(str(len(shard)) for shard in shards)
        raise ValueError(f"{num_shards} shards with at least one image each are wanted, not shards of {sizes} images")
    found = np.concatenate(shards)
    if found.min() < 0 or found.max() >= num_samples:
        raise ValueError(f"there is no image {found.max() if found.max() >= num_samples else found.min()}")
    times = np.bincount(found, minlength=num_samples)
    if (times != 1).any():
        odd = int(np.flatnonzero(times != 1)[0])
        raise ValueError(f"image {odd} is in {times[odd]} shards, and each must be in one")
    return shards
