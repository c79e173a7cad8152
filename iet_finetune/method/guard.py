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

from .deviations import deviations_below, separation
from .rules import Instead, Network, Run, Samples, SkipRule

# Of the noise in which images are looked at.
SEED = 18
# Held-out images that are looked at, if there are so many: their median is then known to a quarter of a deviation.
MOST_HELDOUT = 32
# Training images by which noise levels are chosen, if there are so many.
CHOOSERS = 128
# Parts of the schedule that `guard_below` is told by.
FINE = 1000


@dataclass(frozen=True)
class Seen:
    """What is known of N training images and H held-out ones after looking.

    Attributes:
        reference, heldout_reference: (N, J) and (H, J) fp32, logarithms of losses at the reference round; None before.
            NaN of images that can never be looked at.
        score: (N,) fp32, by how many robust deviations an image's loss has fallen further than held-out images'; 0 of
            those that were not looked at yet.
        looked: (N,) int64, after which round an image was last looked at.
        saved: forward passes that may still be spent.
        draws: (J',) int64, which of the J draws are still looked at; None for all.
    """

    score: Tensor
    looked: Tensor
    saved: float = 0.0
    reference: Tensor | None = None
    heldout_reference: Tensor | None = None
    draws: Tensor | None = None

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

    With `guard_pull` w such a sample pulls instead: with the weight w it learns the reference's prediction of it, so
    that what has been memorized since is taught away. The reference is then kept, frozen, beside the denoiser.

    With `guard_best_levels` J the first look is at all `guard_levels`, and later ones at the J at which training
    images are told best from held-out ones, for which nobody need know what is memorized. With z of one level alone:

        C = mean of the highest quarter of z_i - mean of the highest quarter of z_h

    What looking costs in forward passes is held below `guard_budget` of the training's time, but for the reference
    and for that first look. Where that is not enough for all, those come first that were visited most often since
    they were looked at, copies of the same content together, and twice as soon if they are near to resting; then by
    the hash of their content. No reference is taken of images whose turn cannot come before the run's limit.

    Attributes:
        least_heldout: fewer say too little of how losses fall where nothing is memorized.
        resting: (N,) bool, on the device.
    """

    borrows: ClassVar[tuple[str, ...]] = ("reference",)
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
        # What resting images are pulled to; None while none rests.
        self._reference: Network | None = None

    @classmethod
    def borrows_with(cls, config: Any) -> tuple[str, ...]:
        """The reference, to pull."""
        return cls.borrows if config.guard_pull else ()

    @classmethod
    def teaches(cls, config: Any) -> bool:
        """Whether resting images pull."""
        return config.guard_pull > 0

    @property
    def is_done(self) -> bool:
        """Whether more than half of all images rest."""
        return self._after is not None and bool((self._after.score > self.config.guard_tau).float().mean() > 0.5)

    def begin_round(self, run: Run) -> None:
        """Looks at as many images as the budget allows."""
        before = self._before if run.round == self._round else self._after
        self._round, self._before = run.round, before
        self._after = self._look(run, before or Seen.nothing(len(run.content_hashes)))
        resting = self._after.score > self.config.guard_tau
        self.resting = resting.to(self.device)
        self._reference = run.lend("reference") if self.config.guard_pull and bool(resting.any()) else None

    def _look(self, run: Run, seen: Seen) -> Seen:
        if run.round < self.config.guard_reference:
            return seen
        heldout = range(min(len(run.heldout_hashes), MOST_HELDOUT))
        first, distinct = _first_of_content(run)
        copies = torch.bincount(first)
        if seen.reference is None or seen.heldout_reference is None:
            in_turn = self._next(seen, distinct, copies, run.round + 1)[: self._most_looked_at(run, len(heldout))]
            return self._refer(run, seen, first, distinct[torch.isin(distinct, in_turn)], heldout)
        budget = seen.saved + self.config.guard_budget * run.passes_a_visit * run.visits
        known = distinct[~seen.reference[distinct].isnan().any(dim=1)]
        draws, chooses = seen.draws, self._chooses(seen)
        per_image = len(self._timesteps) if draws is None else len(draws)
        count = int(budget / per_image) - len(heldout)
        count = min(max(count, CHOOSERS) if chooses else count, len(known))
        if count <= 0:
            return replace(seen, saved=budget)
        chosen = self._next(seen, known, copies, run.round)[:count]
        usual = self._log_losses(run, heldout, draws, heldout=True) - seen.heldout_reference
        fallen = self._log_losses(run, chosen.tolist(), draws) - seen.reference[chosen]
        if chooses:
            draws = self._best_draws(fallen, usual)
            fallen, usual = fallen[:, draws], usual[:, draws]
            seen = replace(
                seen,
                draws=draws,
                reference=seen.reference[:, draws],
                heldout_reference=seen.heldout_reference[:, draws],
            )
        score, looked = seen.score.clone(), seen.looked.clone()
        score[chosen], looked[chosen] = deviations_below(fallen.mean(dim=1), usual.mean(dim=1)), run.round
        spent = (len(chosen) + len(heldout)) * per_image
        saved = budget - spent if not chooses else max(budget - spent, 0.0)
        return replace(seen, score=score[first], looked=looked[first], saved=saved)

    def _refer(self, run: Run, seen: Seen, first: Tensor, images: Tensor, heldout: range) -> Seen:
        """Takes the reference of some images, the first of their contents, and of held-out ones."""
        if self.config.guard_pull:
            run.keep_reference()
        reference = torch.full((len(first), len(self._timesteps)), torch.nan)
        reference[images] = self._log_losses(run, images.tolist())
        of_heldout = self._log_losses(run, heldout, heldout=True)
        return replace(seen, reference=reference[first], heldout_reference=of_heldout)

    def _most_looked_at(self, run: Run, heldout: int) -> int:
        """How many images can be looked at for the first time, at most, until the run's limit."""
        levels = self.config.guard_best_levels
        per_image = len(self._timesteps) if levels is None else levels * self.config.guard_draws
        images, saved = CHOOSERS if levels is not None else 0, 0.0
        for _ in range(max(run.rounds_left - 1, 1)):
            saved += self.config.guard_budget * run.passes_a_visit * run.visits
            count = int(saved / per_image) - heldout
            if count > 0:
                images, saved = images + count, saved - (count + heldout) * per_image
        return images

    def _chooses(self, seen: Seen) -> bool:
        levels = self.config.guard_best_levels
        return seen.draws is None and levels is not None and levels < len(self.config.guard_levels)

    def _best_draws(self, fallen: Tensor, usual: Tensor) -> Tensor:
        """(J',) int64, the draws at the levels that tell best.

        Args:
            fallen, usual: (n, J) and (H, J), by how much logarithms of losses have changed since the reference.
        """
        shape = len(self.config.guard_levels), self.config.guard_draws
        ours, theirs = (each.unflatten(1, shape).mean(dim=2) for each in (fallen, usual))
        best = separation(ours, theirs).argsort(descending=True, stable=True)[: self.config.guard_best_levels]
        return torch.arange(len(self._timesteps)).view(shape)[best.sort().values].flatten()

    def _next(self, seen: Seen, images: Tensor, copies: Tensor, round_: int) -> Tensor:
        """The images in the order in which they are to be looked at."""
        visits = (round_ - seen.looked[images]) * copies[images]
        near = seen.score[images] > self.config.guard_tau / 2
        return images[torch.argsort(visits * (1 + near.long()), descending=True, stable=True)]

    def _log_losses(self, run: Run, images: Any, draws: Tensor | None = None, *, heldout: bool = False) -> Tensor:
        if draws is None:
            losses = run.losses("result", images, self._timesteps, SEED, heldout=heldout)
        else:
            timesteps, numbers = [self._timesteps[draw] for draw in draws], draws.tolist()
            losses = run.losses("result", images, timesteps, SEED, heldout=heldout, draws=numbers)
        return losses.clamp(min=torch.finfo(losses.dtype).tiny).log()

    def keep(self, samples: Samples) -> Tensor:
        """(B,) False where the image rests and the noise is little."""
        little = samples.level(FINE) < math.ceil(self.config.guard_below * FINE)
        return ~(self.resting[samples.images] & little)

    def instead(self, samples: Samples) -> Instead | None:
        """The reference's prediction, if resting images are to pull and some rest in this round."""
        if self._reference is None:
            return None
        return Instead(samples.prediction_of(self._reference), self.config.guard_pull)

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


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _first_of_content(run: Run) -> tuple[Tensor, Tensor]:
    """(N,) int64, the first training image with the same content; and these, in the order of their hashes."""
    first: dict[str, int] = {}
    indices = torch.tensor([first.setdefault(content, index) for index, content in enumerate(run.content_hashes)])
    return indices, torch.tensor([first[content] for content in sorted(first)])
