"""What every part of an audit shares."""

from dataclasses import dataclass

import numpy as np
import torch

from ...config.config import Config
from .dataset import AuditData
from .work import Work

NEEDS_HELDOUT = "needs held-out images: give `--holdout_data_dir` or `--holdout_fraction`"
NEEDS_MODEL = "needs the model: only `--generated_dir` was given"


@dataclass(frozen=True)
class AuditContext:
    """The settings, the real images, the folder of results, and the device."""

    config: Config
    data: AuditData
    work: Work
    device: torch.device

    @property
    def seed(self) -> int:
        """Of every draw."""
        return self.config.training.seed

    @property
    def batch(self) -> int:
        """How many images are processed at once."""
        return self.config.audit.eval_batch_size

    @property
    def has_heldout(self) -> bool:
        """Whether there are held-out images."""
        return len(self.data.heldout) > 0


def choose(count: int, limit: int, seed: int) -> np.ndarray:
    """A random subset of `limit` of `range(count)`, ascending; everything if there are no more."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, 2]).choice(count, limit, replace=False))
