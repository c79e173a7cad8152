"""The guard: an early stop for each image by itself.

An image that is being memorized is told by how much further its loss has fallen, since a reference, than the losses of
held-out images. The loss over a reference's is the score of calibrated membership inference (Watson et al., "On the
Importance of Difficulty Calibration in Membership Inference Attacks", ICLR 2022); that it shows at little noise is
known from attacks on diffusion models (Carlini et al., 2023; Duan et al., 2023).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .rules import Run, Samples, SkipRule

# Of the noise in which images are looked at.
SEED = 18
# Held-out images that are looked at, if there are so many: their median is then known to a quarter of a deviation.
MOST_HELDOUT = 32
# Parts of the schedule that `guard_below` is told by.
FINE = 1000
# A median absolute deviation is so much of a standard deviation, if values are normal.
_ROBUST = 1.4826
# A forward pass takes a third of the time of a visit in training.
_VISIT = 3


@dataclass(frozen=True)
class Seen:
    """What is known of N training images and H held-out ones after looking.

    Attributes:
        reference, heldout_reference: (N, J) and (H, J) fp32, logarithms of losses at the reference round; None before.
        score: (N,) fp32, by how many robust deviations an image's loss has fallen further than held-out images'; 0 of
            those that were not looked at yet.
        looked: (N,) int64, after which round an image was last looked at.
        saved: forward passes that may still be spent.
    """

    score: Tensor
    looked: Tensor
    saved: float = 0.0
    reference: Tensor | None = None
    heldout_reference: Tensor | None = None

    @classmethod
    def nothing(cls, images: int) -> "Seen":
        """Before the first look."""
        return cls(torch.zeros(images), torch.zeros(images, dtype=torch.int64))


class Guard(SkipRule):
    """`--skip_rule guard`: images rest, at little noise, while their losses are further down than held-out images'.

    At a round's start, for images i and held-out images h, with noise that is fixed by image,

        s_i = mean over J draws of log l_i(now) - log l_i(reference)
        z_i = (median_h s_h - s_i) / (1.4826 median_h |s_h - median s|)

    and i rests while z_i > tau: its samples below `guard_below` of the schedule give no gradient. "Now" is what would
    be saved, the moving average if there is one. Above that level an image goes on teaching what it shows.

    What looking costs in forward passes is held below `guard_budget` of the training's time, but for the reference.
    Where that is not enough for all, those come first that were visited most often since they were looked at, copies
    of the same content together, and twice as soon if they are near to resting; then by the hash of their content.

    Attributes:
        least_heldout: fewer say too little of how losses fall where nothing is memorized.
        resting: (N,) bool, on the device.
    """

    least_heldout: ClassVar[int] = 8

    def __init__(self, config: Any, **facts: Any) -> None:
        super().__init__(config, **facts)
        wanted = torch.tensor(config.guard_levels, dtype=torch.float64).repeat_interleave(config.guard_draws)
        self._timesteps = self.objective.nearest(wanted)[0].tolist()
        # As the round began, before and after looking: a run that resumes within a round looks once more.
        self._round = -1
        self._before: Seen | None = None
        self._after: Seen | None = None
        self.resting = torch.zeros(0, dtype=torch.bool, device=self.device)

    @property
    def is_done(self) -> bool:
        """Whether more than half of all images rest."""
        return self._after is not None and bool((self._after.score > self.config.guard_tau).float().mean() > 0.5)

    def begin_round(self, run: Run) -> None:
        """Looks at as many images as the budget allows."""
        before = self._before if run.round == self._round else self._after
        self._round, self._before = run.round, before
        self._after = self._look(run, before or Seen.nothing(len(run.content_hashes)))
        self.resting = (self._after.score > self.config.guard_tau).to(self.device)

    def _look(self, run: Run, seen: Seen) -> Seen:
        if run.round < self.config.guard_reference:
            return seen
        heldout = range(min(len(run.heldout_hashes), MOST_HELDOUT))
        first, distinct = _first_of_content(run)
        if seen.reference is None or seen.heldout_reference is None:
            reference = torch.zeros(len(first), len(self._timesteps))
            reference[distinct] = self._log_losses(run, distinct.tolist())
            return replace(
                seen, reference=reference[first], heldout_reference=self._log_losses(run, heldout, heldout=True)
            )
        saved = seen.saved + self.config.guard_budget * _VISIT * run.visits
        count = min(int(saved / len(self._timesteps)) - len(heldout), len(distinct))
        if count <= 0:
            return replace(seen, saved=saved)
        chosen = self._next(seen, distinct, torch.bincount(first)[distinct], run.round)[:count]
        usual = (self._log_losses(run, heldout, heldout=True) - seen.heldout_reference).mean(dim=1)
        fallen = (self._log_losses(run, chosen.tolist()) - seen.reference[chosen]).mean(dim=1)
        score, looked = seen.score.clone(), seen.looked.clone()
        score[chosen], looked[chosen] = deviations_below(fallen, usual), run.round
        spent = (len(chosen) + len(heldout)) * len(self._timesteps)
        return replace(seen, score=score[first], looked=looked[first], saved=saved - spent)

    def _next(self, seen: Seen, images: Tensor, copies: Tensor, round_: int) -> Tensor:
        """The images in the order in which they are to be looked at."""
        visits = (round_ - seen.looked[images]) * copies
        near = seen.score[images] > self.config.guard_tau / 2
        return images[torch.argsort(visits * (1 + near.long()), descending=True, stable=True)]

    def _log_losses(self, run: Run, images: Any, *, heldout: bool = False) -> Tensor:
        losses = run.losses("result", images, self._timesteps, SEED, heldout=heldout)
        return losses.clamp(min=torch.finfo(losses.dtype).tiny).log()

    def keep(self, samples: Samples) -> Tensor:
        """(B,) False where the image rests and the noise is little."""
        little = samples.level(FINE) < math.ceil(self.config.guard_below * FINE)
        return ~(self.resting[samples.images] & little)

    def about_images(self) -> dict[str, Tensor]:
        """`guard_score`, and whether an image `rests`."""
        if self._after is None:
            return {}
        return {"guard_score": self._after.score, "rests": self._after.score > self.config.guard_tau}

    def suspicion(self) -> Tensor | None:
        """`guard_score`, once there has been a look."""
        return None if self._after is None or self._after.reference is None else self._after.score

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, which all clones share."""
        known = {name: asdict(seen) for name, seen in self._known().items() if seen is not None}
        return {"round": self._round, **known}

    def _known(self) -> dict[str, Seen | None]:
        return {"before": self._before, "after": self._after}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it; `begin_round` says who rests."""
        self._round = state["round"]
        self._before, self._after = (
            Seen(**{key: _on_host(value) for key, value in state[name].items()}) if name in state else None
            for name in ("before", "after")
        )


def deviations_below(values: Tensor, usual: Tensor) -> Tensor:
    """By how many robust deviations of the usual values each value is below their median; NaN is no usual value."""
    median = _median(usual)
    deviation = _ROBUST * _median((usual - median).abs())
    return (median - values) / deviation.clamp(min=1e-6)


def _median(values: Tensor) -> Tensor:
    """(1,) the lower median of what is not NaN, as `torch.nanmedian`, which on a GPU waits for the device."""
    middle = ((~values.isnan()).sum(dim=0, keepdim=True) - 1).clamp(min=0) // 2
    return values.sort().values.gather(0, middle)


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _first_of_content(run: Run) -> tuple[Tensor, Tensor]:
    """(N,) int64, the first training image with the same content; and these, in the order of their hashes."""
    first: dict[str, int] = {}
    indices = torch.tensor([first.setdefault(content, index) for index, content in enumerate(run.content_hashes)])
    return indices, torch.tensor([first[content] for content in sorted(first)])
