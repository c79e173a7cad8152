"""Does the GPU compute what the CPU does, and the same thing twice?"""

import contextlib
import os
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...config.config import Config
from ...config.registry import SKIP_RULES
from ...environment import without_tf32
from ...families.tiny import RESOLUTION, tiny_sd
from ...method.rules import Samples, SkipRule
from ...training.callbacks import Callback, StepFacts
from ...training.trainer import Trainer
from ..checks import Machine, expect
from ..trials import UnsavedTrainer, fresh_accelerator, pictures, settings

# Losses of a step, by themselves, in fp32.
CLOSE = 1e-4


class Losses(Callback):
    """Keeps the losses and decisions of every step."""

    wants_losses: ClassVar[bool] = True

    def __init__(self) -> None:
        self.loss: list[Tensor] = []
        self.keep: list[Tensor] = []

    def on_step_end(self, facts: StepFacts) -> None:
        """Notes the step."""
        assert facts.samples is not None
        self.loss.append(facts.samples.loss)
        self.keep.append(facts.samples.keep)


def agreement(machine: Machine, found: dict[str, Any]) -> None:
    """The same run on the CPU and on the GPU: two clones, two rounds, AGC with few bins, so that it skips."""
    machine.need_card()
    with without_tf32():  # torch has it on for convolutions
        ours, theirs = (_losses(machine, cpu=cpu) for cpu in (False, True))
    loss, expected = torch.cat(ours.loss), torch.cat(theirs.loss)
    found["steps"] = len(ours.loss)
    found["largest difference"] = ((loss - expected).abs() / expected).max().item()  # NaN if any is
    found["skipped"] = int((~torch.cat(theirs.keep)).sum())
    found["decided otherwise"] = int((torch.cat(ours.keep) != torch.cat(theirs.keep)).sum())
    expect(found["skipped"] > 0, "nothing was skipped: this shows nothing")
    expect(found["decided otherwise"] == 0, "the skips differ")
    expect(found["largest difference"] <= CLOSE, f"losses differ by more than {CLOSE}")


def _losses(machine: Machine, *, cpu: bool) -> Losses:
    losses = Losses()
    config = settings(
        machine.scratch / str(cpu),
        resolution=RESOLUTION,
        train_batch_size=4,
        num_shards=2,
        merge_every_steps=8,
        max_train_steps=16,
        agc_threshold=0.98,
        agc_bins=2,
        agc_decay=0.5,
        adam_epsilon=1e-4,
        learning_rate=1e-3,
    )
    os.environ["ACCELERATE_USE_CPU"] = str(cpu).lower()
    try:
        with fresh_accelerator():
            UnsavedTrainer(config, [losses], pipeline=tiny_sd(), dataset=pictures(16, RESOLUTION)).train_rounds()
    finally:
        del os.environ["ACCELERATE_USE_CPU"]
    return losses


def repeats(machine: Machine, found: dict[str, Any]) -> None:
    """Three clones that learn nothing merge to what they were; a run with dropout that resumes ends as without."""
    # cuBLAS reads it when it is first used.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    pipeline = tiny_sd()
    before = _weights(pipeline)
    still = settings(
        machine.scratch / "still", resolution=RESOLUTION, train_batch_size=2, num_shards=3, merge_every_steps=2,
        max_train_steps=4, learning_rate=0.0,
    )  # fmt: skip
    with fresh_accelerator():
        Trainer(still, pipeline=pipeline, dataset=pictures(12, RESOLUTION)).train()
    found["changed by learning nothing"] = _changed(before, _weights(pipeline))
    if machine.has_card:
        twice = [_dropped(machine, name, stops=False) for name in ("once", "twice")]
        found["differs, run twice, not asked to repeat itself"] = _difference(*twice)
    # Sums of a GPU depend on the order in which its threads arrive, unless it is told otherwise.
    torch.use_deterministic_algorithms(True)
    straight, again = (_dropped(machine, name, stops=False) for name in ("straight", "again"))
    resumed = _dropped(machine, "resumed", stops=True)
    torch.use_deterministic_algorithms(False)
    found["differs, run twice"] = _difference(straight, again)
    found["differs, resumed"] = _difference(straight, resumed)
    expect(found["changed by learning nothing"] == 0, "weights that learnt nothing changed")
    expect(found["differs, run twice"] == 0, "a run does not repeat itself")
    expect(found["differs, resumed"] == 0, "a resumed run ends otherwise")


class _Stop(Callback):
    """Ends a run in the midst of a round."""

    def on_step_end(self, facts: StepFacts) -> None:
        """Once."""
        if facts.step == 5:
            raise KeyboardInterrupt


def _dropped(machine: Machine, name: str, *, stops: bool) -> list[Tensor]:
    """The weights after two rounds of two clones with dropout, interrupted once or not."""
    config = settings(
        machine.scratch / name, resolution=RESOLUTION, train_batch_size=2, num_shards=2, merge_every_steps=4,
        max_train_steps=8, use_ema=True, checkpointing_steps=2, resume_from_checkpoint="latest", learning_rate=1e-3,
    )  # fmt: skip
    images, pipeline = pictures(8, RESOLUTION), tiny_sd(dropout=0.1)
    if stops:
        with fresh_accelerator(), contextlib.suppress(KeyboardInterrupt):
            Trainer(config, [_Stop()], pipeline=tiny_sd(dropout=0.1), dataset=images).train()
        expect(any(config.output_path.glob("checkpoint-*")), "no checkpoint was written")
    with fresh_accelerator():
        Trainer(config, pipeline=pipeline, dataset=images).train()
    return _weights(pipeline)


def _weights(pipeline: Any) -> list[Tensor]:
    return [parameter.detach().cpu().clone() for parameter in pipeline.unet.parameters()]


def _changed(before: list[Tensor], after: list[Tensor]) -> int:
    return sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    # A tensor's maximum is NaN where there is one, Python's need not be.
    return torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]).max().item()


class _Overflows(Callback):
    """Compares, after each step, whether the gradient scale fell with whether the weights stayed."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.scaler = pipeline, None
        self.before, self.scale = _weights(pipeline), _TOO_LARGE
        self.fallen, self.moved_when_fallen, self.stayed_otherwise = 0, 0, 0

    def on_step_end(self, facts: StepFacts) -> None:
        """Looks at this step."""
        assert self.scaler is not None
        weights, scale = _weights(self.pipeline), self.scaler.get_scale()
        moved, fell = _changed(self.before, weights) > 0, scale < self.scale
        self.fallen += fell
        self.moved_when_fallen += fell and moved
        self.stayed_otherwise += not fell and not moved
        self.before, self.scale = weights, scale


def scaled(machine: Machine, found: dict[str, Any]) -> None:
    """Steps whose scaled gradients overflow change nothing and lower the scale; steps that skip all change no bit."""
    if machine.has_card:
        pipeline: Any = tiny_sd()
        watch = _Overflows(pipeline)
        with fresh_accelerator():
            trainer = UnsavedTrainer(
                _short(machine, "fp16", 40, mixed_precision="fp16", use_ema=True),
                [watch],
                pipeline=pipeline,
                dataset=pictures(8, RESOLUTION),
            )
            local = trainer.run.local
            local._fresh_scaler["scale"], watch.scaler = _TOO_LARGE, local._scaler
            trainer.train_rounds()
        found.update({"scale at last": watch.scale, "steps that overflowed": watch.fallen})
        expect(0 < watch.fallen < 40, "the scale was to come down, and then to fit")
        expect(watch.moved_when_fallen == 0, "a step whose gradients overflowed changed weights")
        expect(watch.stayed_otherwise == 0, "a step whose gradients fit changed nothing")
        expect(all(weight.isfinite().all() for weight in _weights(pipeline)), "weights are not finite")
    pipeline = tiny_sd()
    before = _weights(pipeline)
    SKIP_RULES.register(_NEVER)(Never)
    try:
        with fresh_accelerator():
            config = _short(machine, "skipped", 4, skip_rule=_NEVER, learning_rate=1e-2)
            UnsavedTrainer(config, pipeline=pipeline, dataset=pictures(8, RESOLUTION)).train_rounds()
    finally:
        del SKIP_RULES.entries[_NEVER]
    found["changed by skipped steps"] = _changed(before, _weights(pipeline))
    expect(found["changed by skipped steps"] == 0, "weights changed in steps that skipped everything")


_TOO_LARGE = 2.0**40
_NEVER = "never"


class Never(SkipRule):
    """Skips everything."""

    def keep(self, samples: Samples) -> Tensor:
        """(B,) bool, all False."""
        return torch.zeros_like(samples.loss, dtype=torch.bool)


def _short(machine: Machine, name: str, steps: int, **flags: Any) -> Config:
    """A run of one clone for some steps."""
    return settings(
        machine.scratch / name,
        resolution=RESOLUTION,
        train_batch_size=2,
        num_shards=1,
        merge_every_steps=steps,
        max_train_steps=steps,
        **flags,
    )
