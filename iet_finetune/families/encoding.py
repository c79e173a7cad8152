"""Images to latents and captions to conditions, in chunks of one size, so that bits do not depend on the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Conditions, Family, in_chunks

# Samples encoded at once, always exactly as many, so that a latent's bits do not depend on its batch.
ENCODE_CHUNK = 8


class Encoder:
    """Encodes images and captions with a family's frozen models.

    Args:
        family: its encoders are on the device of the inputs.
        size: samples per call; at most `ENCODE_CHUNK` are encoded at once.
        device: the encoders' device.
    """

    def __init__(self, family: Family, size: int, device: torch.device) -> None:
        self._family = family
        self.chunk = min(ENCODE_CHUNK, size)
        if device.type == "cpu":
            # If the threads do not divide the samples evenly, they split some of them, and then a sample's bits
            # depend on its position in the chunk.
            self.chunk = max(self.chunk - self.chunk % torch.get_num_threads(), 1)

    def images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation (B, C, H, W) of images (B, 3, R, R), as `encode_images`."""
        mean, std = in_chunks(self._family.encode_images, pixel_values, self.chunk)
        return mean, std

    def captions(self, captions: Sequence[str]) -> Conditions:
        """Returns the conditions of B captions, as `encode_captions`, in fp32; empty if the family needs none."""
        if not self._family.needs_captions:
            return {}
        names: list[str] = []

        def encode(chunk: list[str]) -> tuple[Tensor, ...]:
            conditions = self._family.encode_captions(chunk)
            names[:] = conditions
            return tuple(each.float() if each.is_floating_point() else each for each in conditions.values())

        tensors = in_chunks(encode, list(captions), self.chunk)
        return dict(zip(names, tensors, strict=True))
