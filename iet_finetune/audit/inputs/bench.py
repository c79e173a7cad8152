"""What every part of an audit works with."""

from dataclasses import dataclass

import numpy as np
import torch

from ...config.config import Config
from .material import Material
from .work import Work

NEEDS_HELDOUT = "needs held-out images: give `--holdout_data_dir` or `--holdout_fraction`"
NEEDS_MODEL = "needs the model: only `--generated_dir` was given"


@dataclass(frozen=True)
class Bench:
    """The settings, the real images, where results are kept, and the device."""

    config: Config
    material: Material
    work: Work
    device: torch.device

    @property
    def seed(self) -> int:
        """Of every draw."""
        return self.config.training.seed

    @property
    def batch(self) -> int:
        """How many images are judged at once."""
        return self.config.audit.eval_batch_size

    @property
    def has_heldout(self) -> bool:
        """Whether there are images that were not trained on."""
        return len(self.material.heldout) > 0


def choose(count: int, limit: int, seed: int) -> np.ndarray:
    """Ascending numbers of `limit` of `count` things, drawn by the seed; all if there are no more."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, 2]).choice(count, limit, replace=False))
