"""Images to latents and captions to conditions, always as many at once, so that no row's bits depend on its batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Conditions, Family, in_chunks

# Samples encoded at once: always exactly as many, so that a latent's bits do not depend on the batch it is in.
ENCODE_CHUNK = 8


class Encoder:
    """What a family's frozen models make of images and captions.

    Args:
        family: its encoders are on the device of what is encoded.
        size: samples that it is to be given at once; it takes as many, and `ENCODE_CHUNK` at most.
        device: of the encoders.
    """

    def __init__(self, family: Family, size: int, device: torch.device) -> None:
        self._family = family
        self.chunk = min(ENCODE_CHUNK, size)
        if device.type == "cpu":
            # Threads that cannot share the samples out evenly divide some of them among themselves, and then a
            # sample's bits depend on its place in the chunk.
            self.chunk = max(self.chunk - self.chunk % torch.get_num_threads(), 1)

    def images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, H, W) of the posterior of images (B, 3, R, R), as `encode_images`."""
        mean, std = in_chunks(self._family.encode_images, pixel_values, self.chunk)
        return mean, std

    def captions(self, captions: Sequence[str]) -> Conditions:
        """What the denoiser is told about B captions, as `encode_captions`; nothing if the family needs none."""
        if not self._family.needs_captions:
            return {}
        names: list[str] = []

        def encode(chunk: list[str]) -> tuple[Tensor, ...]:
            conditions = self._family.encode_captions(chunk)
            names[:] = conditions
            return tuple(conditions.values())

        tensors = in_chunks(encode, list(captions), self.chunk)
        return dict(zip(names, tensors, strict=True))
