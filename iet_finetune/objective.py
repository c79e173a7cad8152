"""What a denoiser is trained on: noisy latents, the target it must predict, and the loss of each sample."""

import torch
from torch import Tensor


class NoiseSchedule:
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


def per_sample_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """l_i = mean over all but the first dimension of (prediction − target)², in fp32; shape (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
