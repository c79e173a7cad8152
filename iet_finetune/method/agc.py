"""Anti-gradient control: a bank of the usual loss at each timestep decides which samples give no gradient.

Source: Liu, Guan, Wu, Miao, "Iterative Ensemble Training with Anti-Gradient Control for Mitigating Memorization in
Diffusion Models", ECCV 2024, section 3.3. The authors' `mem_ratio` is 1/threshold.
"""

import math

import torch
from torch import Tensor, nn


class AntiGradientControl(nn.Module):
    """Skips the samples of a batch whose loss is suspiciously low for their timestep.

    keep_i = l_i ≥ threshold · bank[t_i], and afterwards bank[t] ← d · bank[t] + (1 − d) · l_i for every sample in
    order, skipped ones too. The bank starts at 0 and so keeps everything at first.

    Args:
        num_train_timesteps: length T of the noise schedule, or the number of noise-level bins.
        threshold: in [0, 1); 0 keeps every sample. The paper's are 0.8 (Stable Diffusion) and 0.5 (CIFAR-10).
        decay: d, in [0, 1).
        bias_correction: compare with bank / (1 − d^count) instead, which corrects for the bank's start at 0 as Adam
            does for its moments (Kingma and Ba, 2015, section 3). The paper's bank keeps nearly everything until an
            entry has seen many losses, which never happens in a run over a few images.

    Attributes:
        bank: (T,) fp32, the moving average of per-sample losses.
        count: (T,) fp32, how many losses each entry has seen.
    """

    bank: Tensor
    count: Tensor

    def __init__(
        self, num_train_timesteps: int, threshold: float = 0.8, decay: float = 0.8, bias_correction: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), not {threshold}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        self.threshold = threshold
        self.decay = decay
        self.bias_correction = bias_correction
        self.register_buffer("bank", torch.zeros(num_train_timesteps))
        self.register_buffer("count", torch.zeros(num_train_timesteps))

    def forward(self, per_sample_loss: Tensor, timesteps: Tensor) -> Tensor:
        """The loss of one whole batch: mean over the kept samples, 0 if none is kept; updates the bank.

        Args:
            per_sample_loss: (B,), each the mean of a sample's squared errors, with gradient.
            timesteps: (B,) integers in [0, T).
        """
        keep = self.keep_mask(per_sample_loss, timesteps)
        self.update(per_sample_loss, timesteps)
        kept_loss = torch.where(keep, per_sample_loss, torch.zeros_like(per_sample_loss))
        return kept_loss.sum() / keep.sum().clamp(min=1)

    @torch.no_grad()
    def keep_mask(self, per_sample_loss: Tensor, timesteps: Tensor) -> Tensor:
        """(B,) bool, False for a sample to be skipped; compares with the bank as it stands."""
        self._follow(per_sample_loss)
        # An entry that has seen no loss keeps everything.
        usual = self.expected_loss(timesteps).nan_to_num(0.0) if self.bias_correction else self.bank[timesteps]
        return per_sample_loss >= self.threshold * usual

    @torch.no_grad()
    def update(self, per_sample_loss: Tensor, timesteps: Tensor) -> None:
        """Adds a step's losses to the bank as if one after the other; losses that are not finite are left out.

        With m losses at a timestep, the j-th of them has weight (1 − d) d^(m−j) and the old value d^m. All samples
        of a timestep compute the same new value, so that the order of the writes cannot matter.
        """
        self._follow(per_sample_loss)
        loss = per_sample_loss.to(self.bank.dtype)
        finite = loss < math.inf
        same = (timesteps[:, None] == timesteps) & finite
        later, occurrences = same.triu(diagonal=1).sum(dim=1), same.sum(dim=1)
        # A masked sum and not a matrix product, which might be rounded to TF32.
        entered = torch.where(same, (1 - self.decay) * torch.pow(self.decay, later) * loss, 0.0).sum(dim=1)
        self.bank[timesteps] = torch.pow(self.decay, occurrences) * self.bank[timesteps] + entered
        self.count.index_add_(0, timesteps, finite.to(self.count.dtype))

    @torch.no_grad()
    def expected_loss(self, timesteps: Tensor) -> Tensor:
        """(B,) the bank's value corrected for its start at 0, bank / (1 − d^count); NaN where it has seen no loss."""
        return self.bank[timesteps] / (1 - torch.pow(self.decay, self.count[timesteps]))

    def _follow(self, tensor: Tensor) -> None:
        if self.bank.device != tensor.device:
            self.to(tensor.device)
