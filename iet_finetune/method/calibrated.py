"""Calibrated anti-gradient control: an image is told by how far its loss has fallen below the pipeline's as it came.

Anti-gradient control compares a loss with what is usual at its timestep, which depends more on how hard an image is
than on whether it was memorized. The loss over a reference's on the same noise does not: it is the score of calibrated
membership inference (Watson et al., "On the Importance of Difficulty Calibration in Membership Inference Attacks",
ICLR 2022).
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .deviations import deviations_below
from .guard import FINE
from .objective import Objective
from .rules import Run, Samples, SkipRule


class CalibratedAGC(SkipRule):
    """`--skip_rule calibrated_agc`: images whose losses have fallen further than others' are skipped.

    In every `calibrated_every`-th pass, at visits of image i with a noise level below `calibrated_below`,

        r_i = log l_i(now) - log l_i(as the pipeline came), on the same noise
        m_i ← d m_i + (1 - d) r_i, freed of its start at 0 by 1 - d^visits, as Adam's moments are

    After such a pass, over the images j of the shard with `calibrated_visits` such visits or more,

        z_i = (median_j m_j - m_i) / (1.4826 median_j |m_j - median m|)

    and images with z_i > tau are skipped until they are judged again, the highest first, and no more than a share
    `calibrated_cap` of the shard: their samples below `calibrated_below` give no gradient. What they lose is still
    looked at, so that an image that is being forgotten learns again. An r that is not finite never enters.

    The reference is the pipeline as it came: it can be had at any time, after a resume too, without weights in the
    checkpoint. The denoiser as a round starts and its moving average have learnt the images themselves, so that the
    loss over theirs would not tell what was learnt before.

    Attributes:
        mean: (n,) fp32, m of the shard's images with its start at 0, on the device.
        visits: (n,) int64, how many r have entered it.
        skipped: (n,) bool.
    """

    borrows: ClassVar[tuple[str, ...]] = ("base",)

    def __init__(self, config: Any, **facts: Any) -> None:
        super().__init__(config, **facts)
        self.mean = torch.zeros(self.num_images, device=self.device)
        self.visits = torch.zeros(self.num_images, dtype=torch.int64, device=self.device)
        self.skipped = torch.zeros(self.num_images, dtype=torch.bool, device=self.device)
        # Samples so far: counted on the host, as the device would have to be waited for.
        self._seen = 0

    @classmethod
    def doubt(cls, config: Any, objective: Objective, visits: int, images: int) -> str | None:
        """Whether an image is looked at often enough in the mean, and whether a shard's share is an image at all."""
        if int(config.calibrated_cap * images) == 0:
            return (
                f"calibrated AGC will skip nothing: `--calibrated_cap {config.calibrated_cap:g}` of a shard of "
                f"{images} images is less than one image. Raise it or lower `--num_shards`."
            )
        host = objective.to("cpu")
        drawn = host.sample_timesteps((torch.arange(FINE, dtype=torch.float64) + 0.5) / FINE)
        share = _is_little(host.levels(drawn, FINE), config).double().mean().item()
        looks = share * visits / images / config.calibrated_every
        if looks >= config.calibrated_visits:
            return None
        return (
            f"calibrated AGC can hardly skip anything: an image's loss is looked at {looks:.2g} times on average, and "
            f"`--calibrated_visits` asks for {config.calibrated_visits}. Train for more passes, or raise "
            "`--calibrated_below`."
        )

    def begin_round(self, run: Run) -> None:
        """Borrows the pipeline as it came."""
        self._base = run.lend("base")

    @property
    def _compares(self) -> bool:
        """Whether this pass does. In each a clone visits all its images, and no step spans two."""
        return self._seen // self.num_images % self.config.calibrated_every == 0

    def keep(self, samples: Samples) -> Tensor:
        """(B,) False where the image is skipped and the noise is little."""
        return ~(self.skipped[samples.members] & _is_little(samples.level(FINE), self.config))

    def note(self, samples: Samples) -> Tensor | None:
        """(B,) the losses of the pipeline as it came; None in a pass that does not compare."""
        return samples.loss_of(self._base) if self._compares else None

    def expected_loss(self, samples: Samples) -> Tensor:
        """(B,) that of the pipeline as it came, so that the ledger has the mean of r; NaN where r does not enter."""
        if samples.noted is None:
            return super().expected_loss(samples)
        return torch.where(_is_little(samples.level(FINE), self.config), samples.noted, torch.nan)

    def update(self, samples: Samples) -> None:
        """Enters a step's r, each image being in it once at most; after the last step of a pass, judges all images."""
        compares = self._compares
        if compares:
            self._enter(samples.members, samples.loss.log() - self.expected_loss(samples).log())
        self._seen += len(samples.loss)
        if compares and self._seen % self.num_images == 0:
            self.skipped = self._judged()

    def _enter(self, members: Tensor, fallen: Tensor) -> None:
        decay, enters, mean = self.config.calibrated_decay, fallen.isfinite(), self.mean[members]
        self.mean[members] = torch.where(enters, decay * mean + (1 - decay) * fallen, mean)
        self.visits[members] += enters

    def _judged(self) -> Tensor:
        """(n,) bool, who is to be skipped."""
        mean = self.mean / (1 - torch.pow(self.config.calibrated_decay, self.visits))
        known = torch.where(self.visits >= self.config.calibrated_visits, mean, torch.nan)
        score = deviations_below(known, known).nan_to_num(-math.inf)
        most = score.argsort(descending=True, stable=True)[: int(self.config.calibrated_cap * self.num_images)]
        chosen = torch.zeros_like(self.skipped)
        chosen[most] = score[most] > self.config.calibrated_tau
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """What the clone knows of its images, and how many samples it has seen."""
        return {"mean": self.mean, "visits": self.visits, "skipped": self.skipped, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.mean, self.visits, self.skipped = (
            state[name].to(self.device, copy=True) for name in ("mean", "visits", "skipped")
        )
        self._seen = state["seen"]


def _is_little(levels: Tensor, config: Any) -> Tensor:
    """Whether noise levels, in `FINE` parts, are below `calibrated_below`."""
    return levels < math.ceil(config.calibrated_below * FINE)
