"""From a micro-batch to what the denoiser sees of it: noisy latents, timesteps, conditions and target."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.config import Config
from ..data.encoded import Encoded
from ..data.loader import MicroBatch
from ..data.transfer import to_device
from ..families.base import Conditions, Family, evaluating
from ..families.encoding import Encoder
from ..method.rules import Network


@dataclass(frozen=True)
class Noised:
    """Noisy samples of a micro-batch, and what the denoiser should predict of them.

    Attributes:
        latents: (B, C, H, W) fp32, noisy.
        timesteps: (B,) int64.
        target: (B, C, H, W) fp32.
    """

    family: Family
    latents: Tensor
    timesteps: Tensor
    conditions: Conditions
    target: Tensor

    def predict(self) -> Tensor:
        """The live denoiser's prediction, (B, C, H, W), with gradient."""
        return self.family.predict(self.latents, self.timesteps, self.conditions)

    @torch.no_grad()
    def predict_with(self, network: Network) -> Tensor:
        """Another network's prediction, (B, C, H, W), without gradient."""
        with calling(self.family, network):
            return self.predict()


class Noising:
    """Encodes and noises micro-batches.

    Args:
        family: the pipeline; its encoders are on the device unless what they make is cached.
        config: the run's settings.
        device: where the denoiser is.
        size: samples in a micro-batch of this rank.
    """

    def __init__(self, family: Family, config: Config, device: torch.device, size: int) -> None:
        self._family, self.device = family, device
        # On a CPU a VAE gives latents in this layout, for which convolutions are faster there. Another has other bits.
        channels_last = config.training.channels_last or device.type == "cpu"
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._encoder = Encoder(family, size, device)

    def __call__(self, batch: MicroBatch) -> Noised:
        """The batch, which is on the device, with the noise and at the timesteps that it brings along."""
        timesteps = to_device(self._family.objective.sample_timesteps(batch.uniform), self.device)
        return self.at(*self.inputs(batch), batch.noise, timesteps)

    def at(self, latents: Tensor, conditions: Conditions, noise: Tensor, timesteps: Tensor) -> Noised:
        """Latents with this noise at these timesteps."""
        objective = self._family.objective
        noisy_latents = objective.add_noise(latents, noise, timesteps).contiguous(memory_format=self._layout)
        target = objective.target(latents, noise, timesteps)
        return Noised(self._family, noisy_latents, timesteps, conditions, target)

    def inputs(self, batch: MicroBatch) -> tuple[Tensor, Conditions]:
        """The latents, and the conditions that go with them."""
        mean, std, conditions = batch.encoded or self._encode(batch)
        std = torch.zeros_like(mean) if std is None else std
        latents = self._family.latents(mean, std, batch.posterior_noise)
        return latents, conditions | self._family.details(batch.sizes, batch.labels)

    def _encode(self, batch: MicroBatch) -> Encoded:
        assert batch.pixel_values is not None
        mean, std = self._encoder.images(batch.pixel_values)
        return Encoded(mean, std, self._encoder.captions(batch.captions))


@contextmanager
def calling(family: Family, network: Network) -> Iterator[None]:
    """Inside, `family.predict` calls this network, without dropout if it is a module."""
    with calling_as_is(family, network):
        if isinstance(network, torch.nn.Module):
            with evaluating(network):
                yield
        else:
            yield


@contextmanager
def calling_as_is(family: Family, network: Network) -> Iterator[None]:
    """Inside, `family.predict` calls this network, in the mode that it is in."""
    own, family.network = family.network, network
    try:
        yield
    finally:
        family.network = own
