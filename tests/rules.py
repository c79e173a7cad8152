"""Skip rules that only tests have."""

import torch

from iet_finetune.config.registry import SKIP_RULES, Entry
from iet_finetune.method.rules import Instead, SkipRule

SEED = 7
TIMESTEPS = (3, 500, 900)


class SkipOdd(SkipRule):
    """By image: those of odd number are skipped."""

    def keep(self, samples):
        return samples.images % 2 == 0


class TeachOdd(SkipOdd):
    """And learn half of the target instead, each with another weight."""

    def instead(self, samples):
        return Instead(samples.target / 2, 0.1 + samples.images)


class Remembering(SkipRule):
    """Skips what has become easier than the round's start and the base were together, and wakes it the next time."""

    borrows = ("base", "merged")

    def __init__(self, config, **facts):
        super().__init__(config, **facts)
        self.skipped_last = torch.zeros(self.num_images, dtype=torch.bool)

    def begin_round(self, run):
        self.base, self.merged = run.lend("base"), run.lend("merged")
        everything = range(len(run.content_hashes))
        self.usual = run.losses("merged", everything, TIMESTEPS, SEED).mean(dim=1)
        heldout = run.losses("base", range(len(run.heldout_hashes)), TIMESTEPS, SEED, heldout=True)
        assert heldout.shape == (len(run.heldout_hashes), 3)
        self.scale = heldout.mean()

    def keep(self, samples):
        reference = samples.loss_of(self.base) / 2 + samples.loss_of(self.merged) / 2
        hard = samples.loss >= reference * (1 + 1e-3 * self.usual[samples.images] / self.scale)
        return hard | self.skipped_last[samples.members]

    def update(self, samples):
        self.skipped_last[samples.members] = ~self.skipped_last[samples.members]

    def state_dict(self):
        return {"skipped_last": self.skipped_last}

    def load_state_dict(self, state):
        self.skipped_last = state["skipped_last"]


class Averaged(SkipRule):
    borrows = ("ema",)

    def begin_round(self, run):
        self.average = run.lend("ema")

    def keep(self, samples):
        return samples.loss >= samples.loss_of(self.average)


class Borrowing(SkipOdd):
    """As `SkipOdd`; borrows two networks and makes no use of them."""

    borrows = ("base", "merged")

    def begin_round(self, run):
        self.lent = [run.lend(which) for which in self.borrows]


class Nothing(SkipRule):
    """Keeps nothing."""

    def keep(self, samples):
        return torch.zeros_like(samples.loss, dtype=torch.bool)


class OnlyInstead(Nothing):
    """Keeps nothing, and all learn the true target instead."""

    def instead(self, samples):
        return Instead(samples.target)


class Asking(SkipOdd):
    """Asks a question when a round begins, and remembers the answer."""

    borrows = ("base", "merged")
    question = None

    def begin_round(self, run):
        if self.question is not None:
            self.answer = self.question(run)


RULES = {
    rule.__name__: Entry(rule.__name__, rule)
    for rule in (SkipOdd, TeachOdd, Remembering, Averaged, Borrowing, Nothing, OnlyInstead, Asking)
}


def register() -> None:
    """Registers them for the rest of the process."""
    SKIP_RULES.entries.update(RULES)
