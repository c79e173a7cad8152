"""Encoded images and captions, read from the cache instead of encoding them again."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .rows import Places, Rows

# Names of the tensors in an image's row; those in a caption's row are the family's conditions.
MEAN, STD, PLACE = "mean", "std", "place"


class Encoded(NamedTuple):
    """The deterministic part of the denoiser's inputs.

    Attributes:
        mean, std: (B, C, H, W) fp32, the posterior of the images; `std` is None if it is not sampled.
        conditions: name -> tensor whose first dimension is the batch.
    """

    mean: Tensor
    std: Tensor | None
    conditions: dict[str, Tensor]


@dataclass(frozen=True)
class EncodedData:
    """The cached rows of a run's images and captions; picklable, and every process maps the files itself.

    Attributes:
        images: rows with `MEAN`, `PLACE` and, if sampled, `STD`, for each size that images are trained on at.
        image_sizes: (n,) int, which of these each image's row is among; None if there is one size.
        image_places: (n, 2, 2) int32, the places of each image's row and of its mirrored copy's.
        captions: rows with the conditions; None without captions.
        caption_places: of the captions' rows, by caption.
    """

    images: tuple[Rows, ...]
    image_sizes: np.ndarray | None
    image_places: np.ndarray
    captions: Rows | None
    caption_places: Places

    def __call__(self, index: int, flip: bool, caption: str) -> tuple[Encoded, Tensor]:
        """Returns one sample without batch dimension, and its `ImageTransform.place`, (4,) int64."""
        rows = self.images[0 if self.image_sizes is None else int(self.image_sizes[index])]
        row = rows.read(self.image_places[index, int(flip)])
        conditions = self.captions.read(self.caption_places[caption]) if self.captions is not None else {}
        return Encoded(row[MEAN], row.get(STD), conditions), row[PLACE]
