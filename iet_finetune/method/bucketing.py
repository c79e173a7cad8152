"""Passes whose steps each take samples of one bucket: which samples go together, and in which order.

Everything is a function of (seed, shard, pass) and of the samples' buckets alone.
"""

from collections.abc import Sequence

import numpy as np

from .seeding import pass_order, step_order


def num_steps(bucket_sizes: Sequence[int], samples_per_step: int) -> int:
    """Σ_b ⌈n_b/(B·A)⌉, the steps of a pass over a shard with n_b samples in each bucket."""
    return sum(-(-size // samples_per_step) for size in bucket_sizes)


def step_sizes(bucket_sizes: Sequence[int], samples_per_step: int) -> list[int]:
    """The samples in each step of a pass, bucket after bucket: each is cut into ⌈n_b/(B·A)⌉ steps, the last shorter.

    Args:
        bucket_sizes: n_b, samples of the shard in each bucket.
    """
    return [min(samples_per_step, size - start) for size in bucket_sizes for start in range(0, size, samples_per_step)]


def step_bounds(seed: int, shard: int, pass_: int, bucket_sizes: Sequence[int], samples_per_step: int) -> np.ndarray:
    """Where the steps of a pass begin and end, in positions of the pass: (steps + 1,) int64, from 0."""
    sizes = np.array(step_sizes(bucket_sizes, samples_per_step), dtype=np.int64)
    return np.concatenate([[0], np.cumsum(sizes[step_order(seed, shard, pass_, len(sizes))])])


def bucketed_order(seed: int, shard: int, pass_: int, buckets: np.ndarray, samples_per_step: int) -> np.ndarray:
    """The order in which a clone visits its shard's samples in one pass: position -> index in the shard.

    Samples are shuffled within their bucket, each bucket is cut into steps, and the steps of all buckets are shuffled.

    Args:
        buckets: (n,) int, the bucket of each sample of the shard.
    """
    shuffled = pass_order(seed, shard, pass_, len(buckets))
    by_bucket = shuffled[np.argsort(buckets[shuffled], kind="stable")]
    _, counts = np.unique(buckets, return_counts=True)
    ends = np.cumsum(step_sizes(counts.tolist(), samples_per_step))
    steps = np.split(by_bucket, ends[:-1])
    return np.concatenate([steps[step] for step in step_order(seed, shard, pass_, len(steps))])
