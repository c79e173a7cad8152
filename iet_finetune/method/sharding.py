"""How the data is split into shards: disjoint, complete, and as even as possible."""

from collections.abc import Sequence

import numpy as np

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
