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
        images: rows with `MEAN`, `PLACE` and, if sampled, `STD`.
        image_places: (n, 2, 2) int32, the places of each image's row and of its mirrored copy's.
        captions: rows with the conditions; None without captions.
        caption_places: of the captions' rows, by caption.
    """

    images: Rows
    image_places: np.ndarray
    captions: Rows | None
    caption_places: Places

    def __call__(self, index: int, flip: bool, caption: str) -> tuple[Encoded, Tensor]:
        """Returns one sample without batch dimension, and its `ImageTransform.place`, (4,) int64."""
        row = self.images.read(self.image_places[index, int(flip)])
        conditions = self.captions.read(self.caption_places[caption]) if self.captions is not None else {}
        return Encoded(row[MEAN], row.get(STD), conditions), row[PLACE]
