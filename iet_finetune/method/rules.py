"""Skip rules: the decision which samples of a step give no gradient, and what these may learn instead."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .objective import Objective, per_sample_loss

# Called as the denoiser is called.
Network = Callable[..., Any]


@dataclass(frozen=True)
class Samples:
    """The samples that a rule looks at: a micro-batch of one rank, or for `SkipRule.update` a whole step.

    Attributes:
        loss: (B,) fp32, the unweighted per-sample losses, without gradient.
        timesteps: (B,) int64, those of the objective.
        members: (B,) int64, indices of the images in the clone's shard.
        shard: (n,) int64, indices of the shard's images among all training images.
        objective: how images become noisy.
        target: (B, C, H, W), what the denoiser should predict; None for a whole step.
        predict: the prediction (B, C, H, W) of another network on the same noisy latents, timesteps and conditions,
            without gradient or dropout; None for a whole step.
        noted: (B,) fp32, what `SkipRule.note` said of a whole step's samples, NaN where it said nothing; None for a
            micro-batch.
    """

    loss: Tensor
    timesteps: Tensor
    members: Tensor
    shard: Tensor
    objective: Objective
    target: Tensor | None = None
    predict: Callable[[Network], Tensor] | None = None
    noted: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """(B,) int64, indices among all training images."""
        return self.shard[self.members]

    def level(self, bins: int) -> Tensor:
        """(B,) int64 in [0, bins): which of so many parts of the noise schedule, from little noise to much."""
        return self.objective.levels(self.timesteps, bins)

    def loss_of(self, network: Network) -> Tensor:
        """(B,) fp32, the losses of another network on the same noisy latents, conditions and target, without gradient.

        Args:
            network: what `Run.lend` gave, or another one that is called as the denoiser is.

        Raises:
            ValueError: as `prediction_of`.
        """
        prediction = self.prediction_of(network)
        assert self.target is not None
        return per_sample_loss(prediction, self.target)

    def prediction_of(self, network: Network) -> Tensor:
        """(B, C, H, W), what another network predicts of the same noisy latents and conditions, without gradient.

        Raises:
            ValueError: these are the samples of a whole step, whose latents are gone.
        """
        if self.predict is None:
            raise ValueError(
                "only `keep`, `note` and `instead` can ask for another network's losses: `update` has no latents"
            )
        return self.predict(network)


class Instead(NamedTuple):
    """What samples that are not kept learn: Σ (1 − keep_i) w_i l'_i / B joins the loss of a step of B samples.

    Attributes:
        target: (B, C, H, W), against which l'_i is taken as l_i is against the true one. Rows of kept samples are not
            looked at.
        weight: w, (B,) or one number.
    """

    target: Tensor
    weight: Tensor | float = 1.0


class Run(Protocol):
    """What `SkipRule.begin_round` may ask about the run, and only then; the same answers on any number of ranks."""

    @property
    def round(self) -> int:
        """Rounds completed so far."""

    @property
    def visits(self) -> int:
        """Samples that all clones together see in a round that is not cut short."""

    @property
    def passes_a_visit(self) -> int:
        """Forward passes that take as long as one sample's visit in training."""

    @property
    def rounds_left(self) -> int:
        """Rounds still to come, this one included, if the run goes on to its limit."""

    @property
    def content_hashes(self) -> Sequence[str]:
        """One a training image, in the order of their indices; copies of an image share it."""

    @property
    def heldout_hashes(self) -> Sequence[str]:
        """The same for the held-out images, of which there may be none; of many, the first 128."""

    def lend(self, which: str) -> Network:
        """A frozen denoiser, which does not change until the next round.

        Args:
            which: "base" as it came, "merged" as the round starts, "ema" for its moving average, or "reference" for
                what `keep_reference` kept; one of those that the rule borrows.
        """

    def keep_reference(self) -> None:
        """Keeps what would be saved as the round starts, to be lent as "reference" in this and all later rounds.

        Checkpoints hold it. The rule must borrow "reference".
        """

    def losses(
        self,
        which: str,
        images: Sequence[int],
        timesteps: Sequence[int],
        seed: int,
        *,
        heldout: bool = False,
        draws: Sequence[int] | None = None,
    ) -> Tensor:
        """(N, J) fp32 on the host, the losses of N images at J timesteps; every rank computes some of them.

        The noise follows from the seed, the image's content and the number of the draw. Images are encoded as
        the mean of their posterior, not mirrored, with their first caption.

        Args:
            which: "merged" as the round starts, "ema" for its moving average, or "result" for what would be saved of
                these; no network is kept for these. Or "base", if the rule borrows it.
            images: indices of training images, or of held-out ones.
            draws: which draw of noise each timestep has; 0 to J - 1 if not given.
        """


class SkipRule(ABC):
    """Decides which samples of a step give no gradient. Each clone has a rule of its own.

    Within a step a rule does not change: all micro-batches are judged before `update` learns of them.

    Args:
        config: the values of the rule's flags.
        objective: how images become noisy.
        num_images: in the clone's shard.
        device: where the clone trains.

    Attributes:
        borrows: which networks the rule asks for, of "base", "merged", "ema" and "reference"; their memory is counted
            before training starts.
        least_heldout: how many held-out images a run must have.
    """

    borrows: ClassVar[tuple[str, ...]] = ()
    least_heldout: ClassVar[int] = 0

    def __init__(self, config: Any, *, objective: Objective, num_images: int, device: torch.device) -> None:
        self.config, self.objective, self.num_images, self.device = config, objective, num_images, device

    @classmethod
    def borrows_with(cls, config: Any) -> tuple[str, ...]:
        """Those of `borrows` that the rule asks for with these values of its flags."""
        return cls.borrows

    @classmethod
    def teaches(cls, config: Any) -> bool:
        """Whether skipped samples may learn something instead, with these values of the rule's flags."""
        return cls.instead is not SkipRule.instead

    @property
    def is_off(self) -> bool:
        """Whether every sample is kept, whatever comes: gradients then need not be rescaled."""
        return False

    @property
    def is_done(self) -> bool:
        """Whether so little is left to learn that `--stop_when auto` may end the run."""
        return False

    @classmethod
    def doubt(cls, config: Any, objective: Objective, visits: int, images: int) -> str | None:
        """Why the rule can hardly act in a run that shows each clone so many samples; None if it can.

        Args:
            visits: of the clone that sees the fewest samples.
            images: in that clone's shard.
        """
        return None

    @classmethod
    def outlook(cls, config: Any, objective: Objective, visits: int, images: int) -> str | None:
        """What the rule sees in such a run, in words, for a plan; None if there is nothing to say.

        Args are those of `doubt`.
        """
        return None

    def begin_round(self, run: Run) -> None:  # noqa: B027 - optional
        """Computes what all shards share, which is then frozen until the merge.

        Every rank calls it for every clone, at the start of a round and again when a run resumes within it. It must
        not depend on the clone's own state nor change it.
        """

    @abstractmethod
    def keep(self, samples: Samples) -> Tensor:
        """(B,) bool, False for a sample to be skipped."""

    def instead(self, samples: Samples) -> Instead | None:
        """What samples that are not kept learn; None if nothing.

        Costs a second backward pass. Whether it is None must not depend on the samples: ranks that train a clone
        together must agree, as must all micro-batches of a step.
        """
        return None

    def note(self, samples: Samples) -> Tensor | None:
        """(B,) fp32, what `update` needs to know of each sample and finds in `samples.noted`. None if nothing.

        Compute here whatever needs latents, such as another network's losses: `update` has none. In a group each rank
        sees only its own samples here.
        """
        return None

    def update(self, samples: Samples) -> None:  # noqa: B027 - optional
        """Learns of a whole step, in the order of its samples, which are the same on all ranks of a group."""

    def expected_loss(self, samples: Samples) -> Tensor:
        """(B,) the usual loss at each sample's timestep, for the ledger; NaN where it is not known."""
        return torch.full_like(samples.loss, torch.nan)

    def about_images(self) -> dict[str, Tensor]:
        """What all shards share of each training image, (N,) by name: further columns of the ledger."""
        return {}

    def suspicion(self) -> Tensor | None:
        """(N,) how strongly each training image seems to be memorized; 0 where nothing suggests it.

        None if the rule does not know: the ledger then says whose loss is low.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """The clone's own state, as tensors and plain values; a checkpoint holds it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Restores what `state_dict` returned; its tensors may be on another device."""
