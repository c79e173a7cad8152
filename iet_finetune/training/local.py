"""One clone's local training: batch, noise, loss, anti-gradient control, step."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.config import Config
from ..data.encoded import Encoded
from ..data.loader import MicroBatch, Shard, Visit, Visits, micro_batches
from ..distributed.groups import Group
from ..ensemble.clone import Clone
from ..ensemble.ema import EMA
from ..ensemble.meter import NOISE_LEVELS
from ..ensemble.optimizers import masked_step
from ..ensemble.trainable import Trainable
from ..families.base import Conditions, Family, evaluating
from ..families.encoding import Encoder
from ..method.objective import per_sample_loss
from ..method.schedule import Step
from .compiling import check_gradients, failure_explained

_DROPOUTS = (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d)


class Judged(NamedTuple):
    """Samples and what came of them: all (B,), on the device.

    Attributes:
        loss: fp32, the unweighted per-sample loss.
        timesteps: int64.
        keep: bool, whether a sample gives a gradient.
        members: int64, indices in the shard.
    """

    loss: Tensor
    timesteps: Tensor
    keep: Tensor
    members: Tensor


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
        self.judged: Judged | None = None
        self._fresh_scaler = scaler.state_dict() if scaler is not None else {}
        # On a CPU a VAE gives latents in this layout, for which convolutions are faster there. Another has other bits.
        channels_last = config.training.channels_last or device.type == "cpu"
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._encoder = Encoder(family, -(-config.training.train_batch_size // group.size), device)

    def run(
        self, clone: Clone, shard: Shard, steps: Sequence[Step], learning_rate: Callable[[int], float]
    ) -> Iterator[Step]:
        """Takes the steps one after the other; yields each when it is done.

        Raises:
            UserError: an image cannot be read.
        """
        if self._scaler is not None:
            self._scaler.load_state_dict(clone.scaler or self._fresh_scaler)
        size = self._config.training.train_batch_size
        batches = micro_batches(
            shard,
            Visits(steps, size, self._group.local_slice),
            num_workers=self._config.data.dataloader_num_workers,
            pin_memory=self._device.type == "cuda",
        )
        for step in steps:
            self._set_learning_rate(learning_rate(step.number))
            parts = step.micro_batches(size)
            self._step(clone, step, zip(parts, islice(batches, len(parts)), strict=True))
            yield step

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def _step(self, clone: Clone, step: Step, batches: Iterator[tuple[range, MicroBatch]]) -> None:
        """One optimizer step; the loss bank stands still until all micro-batches have been judged."""
        samples, size = step.stop - step.start, self._config.training.train_batch_size
        judged = []
        for positions, batch in batches:
            last = positions.stop == step.stop
            # A group averages its gradients once a step, with the last micro-batch.
            apart = contextlib.nullcontext() if last else self._group.no_sync(self._family.network)
            with apart, failure_explained() if self._config.training.compile else contextlib.nullcontext():
                judged.append(
                    self._backward(clone, batch.to(self._device), len(self._group.local_slice(positions)), samples)
                )
        own = Judged(*(torch.cat(part) for part in zip(*judged, strict=True)))
        everyone = self._of_group(own, [len(positions) for positions in step.micro_batches(size)])
        masked, broken = self._prepare_gradients(everyone.loss, everyone.keep)
        masked_step(self._optimizer, masked)
        if self._scaler is not None:
            self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        clone.step += 1
        if self._ema is not None:
            self._ema.update(clone.step, masked)
        self._record(clone, step, everyone, broken)

    def _record(self, clone: Clone, step: Step, judged: Judged, broken: Tensor) -> None:
        self.judged = judged
        loss, timesteps, keep, members = judged
        bins = self._bins(clone, timesteps)
        clone.ledger.record(members, keep, loss, clone.agc.expected_loss(bins))
        clone.agc.update(loss, bins)
        levels = self._family.objective.levels(timesteps, NOISE_LEVELS)
        clone.meter.record(step.number, loss, levels, keep, broken)

    def _of_group(self, own: Judged, batches: list[int]) -> Judged:
        """What all ranks of the group judged, in the order in which one rank alone would have had the samples."""
        if self._group.size == 1:
            return own
        values = self._group.all_gather_samples(torch.stack([part.to(torch.float64) for part in own]), batches)
        return Judged(*(row.to(part.dtype) for row, part in zip(values, own, strict=True)))

    def _backward(self, clone: Clone, batch: MicroBatch, mine: int, samples: int) -> Judged:
        """Adds Σ keep_i l_i / (samples of the step) to the gradient.

        Args:
            mine: how many samples of the batch count: 0 where this rank's share is empty and one sample is run along.
            samples: of the whole step.
        """
        loss, timesteps = self._losses(batch)
        objective = self._family.objective
        keep = self._keep(clone, loss, timesteps) if mine else torch.zeros_like(loss, dtype=torch.bool)
        weighted = loss * objective.loss_weights(timesteps, self._config.training.snr_gamma)
        total = torch.where(keep, weighted, torch.zeros_like(weighted)).sum() / samples
        if self._group.size > 1:
            # The group averages its gradients; their sum is wanted.
            total = total * self._group.size
        (total if self._scaler is None else self._scaler.scale(total)).backward()
        return Judged(loss.detach()[:mine], timesteps[:mine], keep[:mine], batch.members[:mine])

    def _losses(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The unweighted loss of each sample, with gradient, and its timestep."""
        latents, conditions = self._inputs(batch)
        objective = self._family.objective
        # A copy that is waited for would wait for everything before it, too.
        timesteps = objective.sample_timesteps(batch.uniform).to(self._device, non_blocking=True)
        noisy_latents = objective.add_noise(latents, batch.noise, timesteps).contiguous(memory_format=self._layout)
        target = objective.target(latents, batch.noise, timesteps)
        return per_sample_loss(self._family.predict(noisy_latents, timesteps, conditions), target), timesteps

    def check_compiled(self, shard: Shard, tolerance: float) -> None:
        """Compares the compiled denoiser's gradients, of the first samples of a shard, with the uncompiled one's.

        Raises:
            UserError: they differ, the denoiser cannot be compiled, or an image cannot be read.
        """
        first = [[Visit(0, position) for position in range(min(self._config.training.train_batch_size, len(shard)))]]
        (batch,) = micro_batches(shard, first, num_workers=0, pin_memory=False)
        batch = batch.to(self._device)

        def gradients() -> list[Tensor]:
            self._optimizer.zero_grad()
            self._losses(batch)[0].mean().backward()
            return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

        # Without dropout: what is dropped differs between the two.
        with evaluating(self._family.denoiser) if _drops_out(self._family.denoiser) else contextlib.nullcontext():
            check_gradients(gradients, tolerance)
        self._optimizer.zero_grad()

    def _keep(self, clone: Clone, loss: Tensor, timesteps: Tensor) -> Tensor:
        if self._config.agc.agc_threshold == 0:
            return torch.ones_like(loss, dtype=torch.bool)
        return clone.agc.keep_mask(loss, self._bins(clone, timesteps))

    def _bins(self, clone: Clone, timesteps: Tensor) -> Tensor:
        """The entries of the loss bank."""
        return self._family.objective.levels(timesteps, len(clone.agc.bank))

    def _inputs(self, batch: MicroBatch) -> tuple[Tensor, Conditions]:
        """The latents, and what the denoiser is told of them."""
        mean, std, conditions = batch.encoded or self._encode(batch)
        std = torch.zeros_like(mean) if std is None else std
        latents = self._family.latents(mean, std, batch.posterior_noise)
        return latents, conditions | self._family.details(batch.sizes, batch.labels)

    def _encode(self, batch: MicroBatch) -> Encoded:
        assert batch.pixel_values is not None
        mean, std = self._encoder.images(batch.pixel_values)
        return Encoded(mean, std, self._encoder.captions(batch.captions))

    def _prepare_gradients(self, loss: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Normalises by the kept samples and clips.

        Returns:
            masked: scalar fp32, 1 where the step must change nothing: nothing was kept, or it is not finite.
            broken: scalar bool, whether the run has gone wrong; with fp16 a gradient that overflows has not, unless it
                still does where it is no longer scaled up.
        """
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if self._config.agc.agc_threshold > 0:
            torch._foreach_mul_(gradients, keep.numel() / keep.sum().clamp(min=1))
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._config.optimizer.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._config.optimizer.max_grad_norm, norm)
        loss_is_finite = loss.isfinite().all()
        finite = loss_is_finite & norm.isfinite()
        may_overflow = self._scaler._scale >= 1 if self._scaler is not None else torch.zeros_like(finite)
        broken = ~(finite | (loss_is_finite & may_overflow))
        masked = (~finite | ~keep.any()).to(torch.float32)
        return masked, broken

    def park(self, clone: Clone) -> None:
        """Leaves with the clone what `run` needs to go on with it: the gradient scaler's state."""
        if self._scaler is not None:
            clone.scaler = self._scaler.state_dict()


def _drops_out(network: torch.nn.Module) -> bool:
    return any(getattr(module, "p", 0) for module in network.modules() if isinstance(module, _DROPOUTS))
