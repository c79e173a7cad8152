"""Every random draw of a run is a function of (seed, shard, pass, position), so no split or stop changes it.

Each draw comes from `numpy.random.SeedSequence(seed, spawn_key=(purpose, ...))`; numpy pads the seed before it appends
the key, so different keys never give the same stream.
"""

from dataclasses import dataclass

import numpy as np

_SPLIT, _ORDER, _SAMPLE, _NETWORK, _ADAPTER, _WEIGHTS, _IMAGE, _STEPS, _BESIDE, _CLASS_IMAGE = range(10)


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def split_order(seed: int, num_samples: int) -> np.ndarray:
    """The permutation of all samples from which shards are dealt."""
    return _generator(seed, _SPLIT).permutation(num_samples)


def pass_order(seed: int, shard: int, pass_: int, num_samples: int) -> np.ndarray:
    """The order in which a clone visits its shard's samples in one pass: position -> index in the shard."""
    return _generator(seed, _ORDER, shard, pass_).permutation(num_samples)


def step_order(seed: int, shard: int, pass_: int, num_steps: int) -> np.ndarray:
    """The order of a pass's steps where each takes its samples from one bucket: place in the pass -> step."""
    return _generator(seed, _STEPS, shard, pass_).permutation(num_steps)


def network_seed(seed: int, shard: int, round_: int, member: int = 0) -> int:
    """The seed (63 bits) of torch's global generators while a clone trains in a round: dropout uses those.

    `member` is the rank's place in the group that trains the clone: each has its own dropout masks.
    """
    return _torch_seed(seed, _NETWORK, shard, round_, *((member,) if member else ()))


def adapter_seed(seed: int) -> int:
    """The seed (63 bits) of torch's global generator while an adapter's first weights are drawn."""
    return _torch_seed(seed, _ADAPTER)


def weights_seed(seed: int) -> int:
    """The seed (63 bits) of torch's global generator while the weights of a new denoiser are drawn."""
    return _torch_seed(seed, _WEIGHTS)


def class_image_seed(seed: int, number: int) -> int:
    """The seed (63 bits) of the generator from which class image `number` is drawn."""
    return _torch_seed(seed, _CLASS_IMAGE, number)


def _torch_seed(seed: int, *key: int) -> int:
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))


def image_noise(seed: int, content_hash: str, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal, (count, *shape) fp32: the same for every image of these contents, wherever it is.

    Args:
        content_hash: hexadecimal, of any length.
    """
    words = [int(content_hash[i : i + 8], 16) for i in range(0, len(content_hash), 8)]
    return _generator(seed, _IMAGE, *words).standard_normal((count, *shape), dtype=np.float32)


@dataclass(frozen=True)
class SampleDraws:
    """The random draws for one visit to one sample.

    Attributes:
        flip, caption, caption_dropout, timestep: uniform in [0, 1).
        noise, posterior: standard normal, shape (C, H, W), fp32: the diffusion noise, and the draw from the VAE's
            posterior.
        offset: standard normal, shape (C, 1, 1), fp32, for `noise_offset`.
    """

    flip: float
    caption: float
    caption_dropout: float
    timestep: float
    noise: np.ndarray
    posterior: np.ndarray
    offset: np.ndarray


def sample_draws(seed: int, shard: int, pass_: int, position: int, shape: tuple[int, ...]) -> SampleDraws:
    """The draws of the sample at a position of a pass; all of them are made, whichever a run uses.

    Args:
        shape: (C, H, W) of a latent.
    """
    return _draws(_generator(seed, _SAMPLE, shard, pass_, position), shape)


def beside_draws(
    seed: int, shard: int, pass_: int, position: int, shape: tuple[int, ...], count: int
) -> tuple[int, SampleDraws]:
    """Which of `count` class images is trained beside the sample at a position of a pass, and its draws.

    They are a stream of their own, so that the sample's draws are the same with and without class images.
    """
    rng = _generator(seed, _BESIDE, shard, pass_, position)
    return int(rng.integers(count)), _draws(rng, shape)


def _draws(rng: np.random.Generator, shape: tuple[int, ...]) -> SampleDraws:
    flip, caption, caption_dropout, timestep = rng.random(4).tolist()
    noise = rng.standard_normal(shape, dtype=np.float32)
    posterior = rng.standard_normal(shape, dtype=np.float32)
    offset = rng.standard_normal((shape[0], *[1] * (len(shape) - 1)), dtype=np.float32)
    return SampleDraws(flip, caption, caption_dropout, timestep, noise, posterior, offset)
