"""What the tests of flow matching families share: noise levels and weights written from the formulas."""

import math

import numpy as np
import torch
from torch import Tensor


def shifted_sigmas(shift: float, count: int = 1000) -> np.ndarray:
    """σ of each timestep, falling from 1: s σ / (1 + (s - 1) σ) of evenly spaced ones (SD 3's paper, equation 23)."""
    even = np.arange(count, 0, -1) / count
    return shift * even / (1 + (shift - 1) * even)


def cosmap(sigma: float) -> float:
    """The weight 2 / (π (1 - 2σ + 2σ²)) of SD 3's paper, section 3.1."""
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


def random_pair(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Latents and noise (count, 4, 8, 8)."""
    latents, noise = torch.randn(2, count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return latents, noise
