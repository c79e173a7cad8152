"""What a denoiser is trained on: noisy latents, the target it must predict, and the loss of each sample."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

# Parts that the schedule is cut into to find how noisy a timestep is: finer than any schedule.
_FINEST = 1 << 20


class Objective(ABC):
    """How images become noisy, and what the denoiser should predict, at each of T timesteps."""

    @abstractmethod
    def __len__(self) -> int:
        """T."""

    @property
    @abstractmethod
    def default_bins(self) -> int:
        """The default number of entries in AGC's loss bank."""

    @abstractmethod
    def to(self, device: torch.device | str) -> "Objective":
        """The same on another device."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy latents at timesteps (B,) int64 in [0, T); `latents` and `noise` (B, ...) fp32."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict there."""

    @abstractmethod
    def levels(self, timesteps: Tensor, count: int) -> Tensor:
        """(B,) int64 in [0, count): which of `count` parts of the schedule, from low noise to high."""

    def nearest(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """The timesteps (J,) int64 whose noise levels are closest to those wanted, and these levels (J,) float64.

        Args:
            levels: (J,) float64 in [0, 1], fractions of the schedule from low noise to high; sigma for flow matching.
        """
        # On the host: the same on every device.
        every = self.to("cpu").levels(torch.arange(len(self)), _FINEST)
        noisiness = (every.double() + 0.5) / _FINEST
        timesteps = (noisiness[None] - levels[:, None]).abs().argmin(dim=1)
        return timesteps, noisiness[timesteps]

    @abstractmethod
    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Timesteps (B,) int64 from numbers (B,) float64 that are uniform in [0, 1)."""

    @abstractmethod
    def loss_weights(self, timesteps: Tensor, snr_gamma: float | None) -> Tensor | float:
        """The weight of each sample's loss; 1.0 if all weigh the same."""


class NoiseSchedule(Objective):
    """The forward process q(x_t | x_0) = N(sqrt(ᾱ_t) x_0, (1 − ᾱ_t) I) of DDPM (Ho et al., 2020, equation 4).

    Args:
        alphas_cumprod: ᾱ, shape (T,), as a diffusers scheduler holds it; zero at the last step is allowed.
        prediction_type: what the denoiser predicts: `epsilon` (the noise), `v_prediction` or `sample` (x_0).

    Raises:
        ValueError: another prediction type.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon") -> None:
        if prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, not {prediction_type!r}")
        self.alphas_cumprod = alphas_cumprod.to(torch.float32)
        self.prediction_type = prediction_type

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same schedule on another device."""
        return NoiseSchedule(self.alphas_cumprod.to(device), self.prediction_type)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def _scales(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alphas_cumprod[timesteps].reshape(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(ᾱ_t) x_0 + sqrt(1 − ᾱ_t) ε; `latents` and `noise` (B, ...) fp32, `timesteps` (B,) int64."""
        signal, sigma = self._scales(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict at x_t: ε, x_0, or v = sqrt(ᾱ_t) ε − sqrt(1 − ᾱ_t) x_0.

        Source of v: Salimans and Ho, "Progressive Distillation", 2022, appendix D.
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, sigma = self._scales(timesteps, latents)
        return signal * noise - sigma * latents

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio ᾱ_t / (1 − ᾱ_t), shape (B,); 0 where ᾱ_t is 0."""
        alpha_bar = self.alphas_cumprod[timesteps]
        return alpha_bar / (1 - alpha_bar)

    @property
    def default_bins(self) -> int:
        """One per timestep."""
        return len(self)

    def levels(self, timesteps: Tensor, count: int) -> Tensor:
        """⌊t · count / T⌋; with count = T the timestep itself."""
        return timesteps * count // len(self)

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """⌊u T⌋: every timestep is equally likely."""
        return (uniform * len(self)).long()

    def loss_weights(self, timesteps: Tensor, snr_gamma: float | None) -> Tensor | float:
        """Min-SNR weights, or 1.0 without γ."""
        return 1.0 if snr_gamma is None else self.min_snr_weights(timesteps, snr_gamma)

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Loss weights (B,) that are min(SNR, γ) in the x_0 parametrisation (Hang et al., 2023, section 3.4).

        For ε the weight is min(SNR, γ)/SNR, written as min(1, γ/SNR) so that SNR = 0 gives 1 and not 0/0; for v it
        is min(SNR, γ)/(SNR + 1).
        """
        snr = self.snr(timesteps)
        if self.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1.0)
        if self.prediction_type == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        return snr.clamp(max=gamma)


WEIGHTING_SCHEMES = ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")


class FlowMatching(Objective):
    """Rectified flow: x_σ = (1 − σ) x_0 + σ ε, and the denoiser predicts the velocity ε − x_0.

    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024, sections 2
    and 3, whose weighting schemes are named as in diffusers' training scripts.

    Args:
        sigmas: σ of each timestep, (T,), falling from 1 as a diffusers scheduler holds them.
        weighting_scheme: how timesteps are drawn (`logit_normal`, `mode`, else uniformly) and how losses are weighted
            (`sigma_sqrt`: σ⁻², `cosmap`: 2 / (π (1 − 2σ + 2σ²)), else 1).
        logit_mean, logit_std: of the logit-normal distribution.
        mode_scale: s of the distribution with a heavier middle.
    """

    def __init__(
        self,
        sigmas: Tensor,
        weighting_scheme: str = "none",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
    ) -> None:
        if weighting_scheme not in WEIGHTING_SCHEMES:
            raise ValueError(f"weighting_scheme must be one of {', '.join(WEIGHTING_SCHEMES)}")
        self.sigmas = sigmas.to(torch.float32)
        self.weighting_scheme = weighting_scheme
        self._settings = logit_mean, logit_std, mode_scale

    def to(self, device: torch.device | str) -> "FlowMatching":
        """The same on another device."""
        return FlowMatching(self.sigmas.to(device), self.weighting_scheme, *self._settings)

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    def default_bins(self) -> int:
        """100: drawn unevenly, single timesteps would be visited too seldom."""
        return 100

    def sigma(self, timesteps: Tensor) -> Tensor:
        """σ, (B,) fp32."""
        return self.sigmas[timesteps]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_σ = (1 − σ) x_0 + σ ε."""
        sigma = self.sigma(timesteps).reshape(-1, *[1] * (latents.ndim - 1))
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """ε − x_0."""
        return noise - latents

    def levels(self, timesteps: Tensor, count: int) -> Tensor:
        """⌊σ · count⌋, and count − 1 for σ = 1."""
        return (self.sigma(timesteps) * count).long().clamp(max=count - 1)

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """⌊v T⌋, v being u itself or following the weighting scheme's distribution (section 3.1 of the paper)."""
        mean, std, scale = self._settings
        if self.weighting_scheme == "logit_normal":
            # In float64 u = 0 and numbers next to 1 stay apart from the ends of [0, 1).
            uniform = torch.sigmoid(mean + std * torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12)))
        if self.weighting_scheme == "mode":
            uniform = 1 - uniform - scale * (torch.cos(math.pi * uniform / 2).square() - 1 + uniform)
        return (uniform * len(self)).long().clamp(0, len(self) - 1)

    def loss_weights(self, timesteps: Tensor, snr_gamma: float | None) -> Tensor | float:
        """Those of the weighting scheme; min-SNR weights are not defined here, and γ must be None."""
        if snr_gamma is not None:
            raise ValueError("min-SNR weights are for noise schedules, not for flow matching")
        sigma = self.sigma(timesteps)
        if self.weighting_scheme == "sigma_sqrt":
            return sigma**-2.0
        if self.weighting_scheme == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
        return 1.0


def per_sample_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """l_i = mean over all but the first dimension of (prediction − target)², in fp32; shape (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
