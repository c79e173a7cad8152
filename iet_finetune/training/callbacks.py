"""Callbacks: what a run passes to code from outside while it goes on. They read facts and change nothing."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class RunFacts:
    """Where a run stands when it begins, goes on from a checkpoint, or ends.

    Attributes:
        output: the output folder.
        rank: the number of this process among the ranks of the run.
        num_images, num_shards: training images, and the shards they are split into.
        total_steps, total_rounds: of the whole run; steps are those of all clones together.
        step, round: steps taken and rounds completed so far.
    """

    output: Path
    rank: int
    num_images: int
    num_shards: int
    total_steps: int
    total_rounds: int
    step: int
    round: int


@dataclass(frozen=True)
class LoggedFacts:
    """Means over what a clone has done since it was logged last, and its learning rate."""

    loss: float
    skip_rate: float
    learning_rate: float


@dataclass(frozen=True)
class SampleFacts:
    """The samples of a step, in order: tensors (B,) on the CPU.

    Attributes:
        images: int64, indices of the training images.
        loss: fp32, unweighted.
        timesteps: int64.
        keep: bool, whether a sample gave a gradient.
    """

    images: Tensor
    loss: Tensor
    timesteps: Tensor
    keep: Tensor


@dataclass(frozen=True)
class StepFacts:
    """This rank's clone has taken a step.

    Attributes:
        step: steps of all clones together.
        round: the number, from 1, of the round under way.
        shard: of the clone, from 0.
        clone_step: steps that the clone has taken over the whole run.
        images: images in this step, over all clones that train at the same time.
        logged: read from the device every `--logging_steps` steps of the clone and after its last step of a round;
            None after all other steps.
        samples: None unless a callback of the run sets `wants_losses`.
    """

    step: int
    round: int
    shard: int
    clone_step: int
    images: int
    logged: LoggedFacts | None
    samples: SampleFacts | None


@dataclass(frozen=True)
class RoundFacts:
    """The clones of a round are merged.

    Attributes:
        step: steps of all clones together.
        round: the number of rounds completed.
        metrics: the line of `metrics.jsonl`.
        pipeline: lends the pipeline with the merged weights, or their moving average if there is one, to draw with or
            to measure: `with facts.pipeline() as pipeline:`, with all its text encoders on the device. None on all
            ranks but the main one.
    """

    step: int
    round: int
    metrics: Mapping[str, Any]
    pipeline: Callable[[], AbstractContextManager[Any]] | None


@dataclass(frozen=True)
class CheckpointFacts:
    """This rank has written its part of a checkpoint, which is complete once all ranks have."""

    step: int
    folder: Path


@dataclass(frozen=True)
class ImagesFacts:
    """The validation images of a round are drawn; round 0 is the pipeline before training."""

    round: int
    file: Path


class Callback:
    """Is called while a run goes on: `Trainer(config, callbacks=[...])`. Override the methods you need.

    Every rank calls its own callbacks, about the clones that it trains. An exception ends the run like any error.

    Attributes:
        wants_losses: whether `on_step_end` gets the losses by sample. They are copied from the device after each step,
            which then waits for it.
    """

    wants_losses: ClassVar[bool] = False

    def on_phase(self, phase: str) -> None:
        """The run turns to something else.

        Before `on_run_begin` reading, loading, drawing class images, encoding and preparing, after it drawing, looking
        (at losses, of images that rest or are held out), training, merging, saving and auditing.
        """

    def on_run_begin(self, facts: RunFacts) -> None:
        """The run begins, or goes on from a checkpoint; no step has been taken yet."""

    def on_step_end(self, facts: StepFacts) -> None:
        """A step is taken; its checkpoint, if it has one, is not written yet."""

    def on_round_end(self, facts: RoundFacts) -> None:
        """The clones are merged; the checkpoint of the round is not written yet."""

    def on_checkpoint(self, facts: CheckpointFacts) -> None:
        """A checkpoint is written."""

    def on_images(self, facts: ImagesFacts) -> None:
        """Validation images are drawn; on the main rank alone."""

    def on_run_end(self, facts: RunFacts) -> None:
        """All is trained, saved and, if asked for, audited and pushed; not called for a run that fails."""
