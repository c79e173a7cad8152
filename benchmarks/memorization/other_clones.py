"""The guard with the other shards' clones as reference: they have not seen the image since the last merge."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from iet_finetune import Callback, Trainer, register_sharding, register_skip_rule
from iet_finetune.config.registry import SHARDINGS, SKIP_RULES
from iet_finetune.config.settings import GuardConfig
from iet_finetune.method.deviations import deviations_below
from iet_finetune.method.guard import MOST_HELDOUT, SEED, Guard, Seen
from iet_finetune.method.rules import Instead, Run, Samples

NAME, SHARDING = "other_clones", "whole_contents"


def register() -> None:
    """Lets `--skip_rule other_clones` choose the rule, and `--shard_strategy whole_contents` the shards."""
    if NAME not in SKIP_RULES.entries:
        register_skip_rule(NAME)(OtherClones)
    if SHARDING not in SHARDINGS.entries:
        register_sharding(SHARDING)(whole_contents)
    OtherClones.found = Found()


def whole_contents(images: Any, num_shards: int, seed: int) -> list[np.ndarray]:
    """Shards such that all images of one content are in one of them: the largest first, each to the smallest shard."""
    contents = np.unique(images.content_hashes, return_inverse=True)[1]
    order = np.random.default_rng(seed).permutation(contents.max() + 1)
    times = np.bincount(contents)
    of_content, sizes = np.zeros(len(times), np.int64), np.zeros(num_shards)
    for content in order[np.argsort(-times[order], kind="stable")]:
        of_content[content] = sizes.argmin()
        sizes[sizes.argmin()] += times[content]
    return [np.flatnonzero(of_content[contents] == shard) for shard in range(num_shards)]


@dataclass
class Found:
    """Losses under each clone as its local training ended, by shard.

    Attributes:
        members: (n,) int64, the images of the shard.
        ours, heldout: (N, J) and (H, J), of all training images and of held-out ones.
    """

    members: dict[int, Tensor] = field(default_factory=dict)
    ours: dict[int, Tensor] = field(default_factory=dict)
    heldout: dict[int, Tensor] = field(default_factory=dict)

    def scores(self, count: int) -> Tensor:
        """(N,) by how many robust deviations of held-out images an image's loss is further down; 0 where not known.

        With l_k the loss under the clone of the image's shard k, and l_j under the others', on the same noise,

            s_i = mean over J draws of log l_k - log mean over j of l_j

        and of held-out images the same, which are in no shard.
        """
        score = torch.zeros(count)
        for shard, members in self.members.items():
            here, there = (self._apart(losses, shard) for losses in (self.ours, self.heldout))
            score[members] = deviations_below(here[members], there)
        return score

    def _apart(self, losses: dict[int, Tensor], shard: int) -> Tensor:
        others = torch.stack([each for other, each in losses.items() if other != shard]).mean(dim=0)
        return (losses[shard].log() - others.log()).mean(dim=1)


class OtherClones(Guard):
    """Images rest whose loss is further down under the clone that trained on them than under the others.

    What a clone loses of an image cannot be asked through `Run`: `Listening` asks while the clone is live. So the rule
    works in one process alone, and not after a stop.
    """

    found: ClassVar[Found] = Found()

    def __init__(self, config: Any, **facts: Any) -> None:
        super().__init__(GuardConfig(), **facts)

    @classmethod
    def borrows_with(cls, config: Any) -> tuple[str, ...]:
        """Nothing."""
        return ()

    @classmethod
    def teaches(cls, config: Any) -> bool:
        """Never."""
        return False

    def begin_round(self, run: Run) -> None:
        """Takes the scores of the round before."""
        score = self.found.scores(len(run.content_hashes))
        self._round = run.round
        self._after = Seen(score, torch.full((len(score),), run.round))
        self.resting = (score > self.config.guard_tau).to(self.device)

    def instead(self, samples: Samples) -> Instead | None:
        """Nothing."""
        return None

    @property
    def timesteps(self) -> list[int]:
        """At which losses are looked at."""
        return self._timesteps


class Listening(Callback):
    """Asks for the losses of all images under each clone before it is merged.

    Attributes:
        trainer: of the run.
    """

    trainer: Trainer | None = None

    def on_phase(self, phase: str) -> None:
        """A clone has trained its round: it is live."""
        if phase != "merging" or self.trainer is None or self.trainer.ensemble.live is None:
            return
        lender, clone = self.trainer.run.lender, self.trainer.ensemble.live
        assert isinstance(clone.rule, OtherClones)
        timesteps, heldout = clone.rule.timesteps, range(min(len(lender.heldout_hashes), MOST_HELDOUT))
        _, first, inverse = np.unique(lender.content_hashes, return_index=True, return_inverse=True)
        found, shard = clone.rule.found, clone.shard
        found.members[shard] = torch.from_numpy(self.trainer.data.indices[shard])
        found.ours[shard] = lender.live_losses(first.tolist(), timesteps, SEED)[torch.from_numpy(inverse)]
        found.heldout[shard] = lender.live_losses(heldout, timesteps, SEED, heldout=True)
