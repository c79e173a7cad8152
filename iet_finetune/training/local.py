"""One clone's local training: batch, noise, loss, anti-gradient control, step."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.config import Config
from ..data.loader import MicroBatch, Shard, Visits, micro_batches
from ..data.transfer import copies_ahead
from ..distributed.groups import Group
from ..ensemble.clone import Clone
from ..ensemble.ema import EMA
from ..ensemble.meter import NOISE_LEVELS
from ..ensemble.optimizers import masked_step
from ..ensemble.trainable import Trainable
from ..families.base import Family, evaluating
from ..method.objective import per_sample_loss
from ..method.rules import Samples, SkipRule
from ..method.schedule import Step
from .compiling import check_gradients, failure_explained
from .noising import Noised, Noising, calling_as_is

_DROPOUTS = (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d)


class SampleLosses(NamedTuple):
    """Samples and what the skip rule decided about them: all (B,), on the device.

    Attributes:
        loss: fp32, the unweighted per-sample loss.
        timesteps: int64.
        keep: bool, whether a sample is kept.
        learns: bool, whether it is kept or learns something instead.
        members: int64, indices in the shard.
        noted: fp32, what the rule wants to know of a sample after the step; NaN if nothing.
        beside: fp32, the unweighted loss of the class image trained beside a sample; 0 without one.
    """

    loss: Tensor
    timesteps: Tensor
    keep: Tensor
    learns: Tensor
    members: Tensor
    noted: Tensor
    beside: Tensor


class LocalTraining:
    """Trains whichever clone is live in the trainable.

    Args:
        family: the pipeline, on the device.
        trainable: the live tensors of the denoiser.
        optimizer: works on them.
        ema: their live moving average, or None.
        config: the run's settings.
        device: where the denoiser is.
        group: the ranks that train the clone together, each a share of every micro-batch.
        noising: makes noisy latents of micro-batches.
        scaler: the gradient scaler of fp16 training, or None.

    Attributes:
        judged: the samples of the last step.
    """

    def __init__(
        self,
        family: Family,
        trainable: Trainable,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        config: Config,
        device: torch.device,
        group: Group,
        noising: Noising,
        scaler: Any = None,
    ) -> None:
        self._family = family
        self._parameters = list(trainable.parameters.values())
        self._optimizer = optimizer
        self._ema = ema
        self._config = config
        self._device = device
        self._group = group
        self._scaler = scaler
        self.judged: SampleLosses | None = None
        self._fresh_scaler = scaler.state_dict() if scaler is not None else {}
        self._noising = noising
        # Of the shard that is trained on: its images' indices among all training images.
        self._images = torch.empty(0, dtype=torch.int64, device=device)
        # Of the step that is taken, by parameter: gradients that the number of kept samples must not rescale, of what
        # skipped samples learn instead and of class images.
        self._apart: list[Tensor] | None = None

    def run(
        self, clone: Clone, shard: Shard, steps: Sequence[Step], learning_rate: Callable[[int], float]
    ) -> Iterator[Step]:
        """Takes the steps one after the other; yields each when it is done.

        Raises:
            UserError: an image cannot be read.
        """
        if self._scaler is not None:
            self._scaler.load_state_dict(clone.scaler or self._fresh_scaler)
        self._images = torch.from_numpy(shard.indices).to(self._device)
        size = self._config.training.train_batch_size
        batches = self._read(shard, steps)
        beside = self._read(shard.beside, steps) if shard.beside is not None else repeat(None)
        for step in steps:
            self._set_learning_rate(learning_rate(step.number))
            parts = step.micro_batches(size)
            count = len(parts)
            self._step(clone, step, zip(parts, islice(batches, count), islice(beside, count), strict=True))
            yield step

    def _read(self, shard: Shard, steps: Sequence[Step]) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the steps."""
        return micro_batches(
            shard,
            Visits(steps, self._config.training.train_batch_size, self._group.local_slice),
            num_workers=self._config.data.dataloader_num_workers,
            pin_memory=copies_ahead(self._device),
        )

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def _step(self, clone: Clone, step: Step, batches: Iterator[tuple[range, MicroBatch, MicroBatch | None]]) -> None:
        """One optimizer step; the skip rule stands still until it has judged all micro-batches.

        Args:
            batches: positions of each whole micro-batch, this rank's part of it, and the class images beside that.
        """
        samples, size = step.stop - step.start, self._config.training.train_batch_size
        judged = []
        for positions, batch, beside in batches:
            last, own_samples = positions.stop == step.stop, len(self._group.local_slice(positions))
            # A group averages its gradients once a step, with the last micro-batch.
            local = contextlib.nullcontext() if last else self._group.no_sync(self._family.network)
            with local, failure_explained() if self._config.training.compile else contextlib.nullcontext():
                losses = self._backward(clone.rule, batch.to(self._device), own_samples, samples)
                if beside is not None:
                    losses = losses._replace(beside=self._learn_class(beside.to(self._device), own_samples, samples))
                judged.append(losses)
        own = SampleLosses(*(torch.cat(part) for part in zip(*judged, strict=True)))
        everyone = self._of_group(own, [len(positions) for positions in step.micro_batches(size)])
        masked, broken = self._prepare_gradients(clone.rule, everyone)
        masked_step(self._optimizer, masked)
        if self._scaler is not None:
            self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        clone.step += 1
        if self._ema is not None:
            self._ema.update(clone.step, masked)
        self._record(clone, step, everyone, broken)

    def _record(self, clone: Clone, step: Step, everyone: SampleLosses, broken: Tensor) -> None:
        self.judged = everyone
        loss, timesteps, keep, _, members, noted, _ = everyone
        samples = replace(self._samples(loss, timesteps, members), noted=noted)
        clone.ledger.record(members, keep, loss, clone.rule.expected_loss(samples))
        clone.rule.update(samples)
        clone.meter.record(step.number, loss, samples.level(NOISE_LEVELS), keep, broken)

    def _of_group(self, own: SampleLosses, batches: list[int]) -> SampleLosses:
        """What all ranks of the group judged, in the order in which one rank alone would have had the samples."""
        if self._group.size == 1:
            return own
        values = self._group.all_gather_samples(torch.stack([part.to(torch.float64) for part in own]), batches)
        return SampleLosses(*(row.to(part.dtype) for row, part in zip(values, own, strict=True)))

    def _backward(self, rule: SkipRule, batch: MicroBatch, own: int, samples: int) -> SampleLosses:
        """Adds Σ keep_i l_i / (samples of the step) to the gradient; the rule decides here, and only here.

        Args:
            own: how many samples of the batch count: 0 where this rank's share is empty and one sample is run along.
            samples: of the whole step.
        """
        prediction, loss, seen = self._forward(batch)
        keep = rule.keep(seen) if own else torch.zeros_like(loss, dtype=torch.bool)
        weights = self._family.objective.loss_weights(seen.timesteps, self._config.training.snr_gamma)
        learns = keep
        weighted = loss * weights
        total = torch.where(keep, weighted, torch.zeros_like(weighted)).sum() / samples
        if (instead := rule.instead(seen)) is not None:
            assert seen.target is not None
            weight = torch.where(keep, 0.0, instead.weight) * (own > 0)
            learns = keep | (weight != 0)
            # Rows of kept samples may hold anything, which must not reach a gradient even times 0.
            target = torch.where(keep.view(-1, *[1] * (prediction.ndim - 1)), seen.target, instead.target)
            others = (weight * weights * per_sample_loss(prediction, target)).sum() / samples
            if own == samples and self._group.size == 1 and not rule.is_off:
                # The whole step: by how much its gradient will be rescaled is known, so one backward pass does.
                total = total + others * (keep.sum().clamp(min=1) / samples)
            else:
                self._add_apart(others, retain_graph=True)
        if self._group.size > 1:
            # The group averages its gradients; their sum is wanted.
            total = total * self._group.size
        (total if self._scaler is None else self._scaler.scale(total)).backward()
        # Now that the activations are freed: another network's take their place.
        noted = rule.note(seen) if own else None
        noted = torch.full_like(seen.loss, torch.nan) if noted is None else noted
        beside = torch.zeros_like(seen.loss)
        parts = (seen.loss, seen.timesteps, keep, learns, seen.members, noted, beside)
        return SampleLosses(*(part[:own] for part in parts))

    def _learn_class(self, batch: MicroBatch, own: int, samples: int) -> Tensor:
        """Adds w Σ l_j / (samples of the step) over class images to the gradient, w being `--prior_loss_weight`.

        Takes the arguments of `_backward`.

        Returns:
            (own,) fp32, their unweighted losses.
        """
        if not own:
            self._sums_apart()
            return batch.noise.new_zeros(0)
        # Not by DDP, which would average gradients with the last micro-batch's: these are summed once a step.
        with calling_as_is(self._family, self._family.denoiser):
            noised = self._noising(batch)
            loss = per_sample_loss(noised.predict(), noised.target)
        weighted = loss * self._family.objective.loss_weights(noised.timesteps, self._config.training.snr_gamma)
        self._add_apart(self._config.prior.prior_loss_weight * weighted.sum() / samples)
        return loss.detach()

    def _add_apart(self, total: Tensor, retain_graph: bool = False) -> None:
        """Adds the gradient of what the number of kept samples must not rescale."""
        if self._scaler is not None:
            total = self._scaler.scale(total)
        parts = torch.autograd.grad(total, self._parameters, retain_graph=retain_graph, allow_unused=True)
        used = [(sum_, part) for sum_, part in zip(self._sums_apart(), parts, strict=True) if part is not None]
        torch._foreach_add_([sum_ for sum_, _ in used], [part for _, part in used])

    def _sums_apart(self) -> list[Tensor]:
        """The sums of such gradients in this step, which begin at 0."""
        if self._apart is None:
            self._apart = [torch.zeros_like(parameter) for parameter in self._parameters]
        return self._apart

    def _forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Samples]:
        """The prediction and the unweighted loss of each sample, with gradient, and what a skip rule sees of them."""
        noised = self._noising(batch)
        loss = per_sample_loss(prediction := noised.predict(), noised.target)
        return prediction, loss, self._samples(loss.detach(), noised.timesteps, batch.members, noised)

    def _samples(self, loss: Tensor, timesteps: Tensor, members: Tensor, noised: Noised | None = None) -> Samples:
        target, predict = (noised.target, noised.predict_with) if noised is not None else (None, None)
        return Samples(loss, timesteps, members, self._images, self._family.objective, target, predict)

    def check_compiled(self, shard: Shard, steps: Sequence[Step], tolerance: float) -> None:
        """Compares the compiled denoiser's gradients, of the first samples of a shard, with the uncompiled one's.

        Args:
            steps: the first one, of which the first micro-batch is taken.

        Raises:
            UserError: they differ, the denoiser cannot be compiled, or an image cannot be read.
        """
        first = islice(Visits(steps, self._config.training.train_batch_size), 1)
        (batch,) = micro_batches(shard, list(first), num_workers=0, pin_memory=False)
        batch = batch.to(self._device)

        def gradients() -> list[Tensor]:
            self._optimizer.zero_grad()
            self._forward(batch)[1].mean().backward()
            return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

        # Without dropout: what is dropped differs between the two.
        with evaluating(self._family.denoiser) if _drops_out(self._family.denoiser) else contextlib.nullcontext():
            check_gradients(gradients, tolerance)
        self._optimizer.zero_grad()

    def _prepare_gradients(self, rule: SkipRule, samples: SampleLosses) -> tuple[Tensor, Tensor]:
        """Normalises by the kept samples, adds what the skipped ones learn instead and the class images, and clips.

        Returns:
            masked: scalar fp32, 1 where the step must change nothing: nothing was learnt, or it is not finite.
            broken: scalar bool, whether the run has gone wrong; with fp16 a gradient that overflows has not, unless it
                still does where it is no longer scaled up.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if not rule.is_off:
            torch._foreach_mul_(gradients, len(samples.keep) / samples.keep.sum().clamp(min=1))
        if self._apart is not None:
            self._group.all_reduce(self._apart)
            used = zip(self._parameters, self._apart, strict=True)
            torch._foreach_add_(gradients, [part for parameter, part in used if parameter.grad is not None])
            self._apart = None
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._config.optimizer.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._config.optimizer.max_grad_norm, norm)
        loss_is_finite = samples.loss.isfinite().all() & samples.beside.isfinite().all()
        finite = loss_is_finite & norm.isfinite()
        may_overflow = self._scaler._scale >= 1 if self._scaler is not None else torch.zeros_like(finite)
        broken = ~(finite | (loss_is_finite & may_overflow))
        learns = samples.learns.any() | self._config.prior.is_on
        masked = (~finite | ~learns).to(torch.float32)
        return masked, broken

    def park(self, clone: Clone) -> None:
        """Leaves with the clone what `run` needs to go on with it: the gradient scaler's state."""
        if self._scaler is not None:
            clone.scaler = self._scaler.state_dict()


def _drops_out(network: torch.nn.Module) -> bool:
    return any(getattr(module, "p", 0) for module in network.modules() if isinstance(module, _DROPOUTS))
