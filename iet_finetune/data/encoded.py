"""What images and captions were encoded to, looked up instead of read and encoded again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .rows import Rows

# Names of the tensors in a row of an image; those in a row of a caption are the family's conditions.
MEAN, STD, PLACE = "mean", "std", "place"


class Encoded(NamedTuple):
    """What the denoiser is to be given of samples, but for what chance adds.

    Attributes:
        mean, std: (B, C, H, W) fp32, the posterior of the images; `std` is None where nothing is drawn from it.
        conditions: tensors by name whose first dimension is the batch.
    """

    mean: Tensor
    std: Tensor | None
    conditions: dict[str, Tensor]


@dataclass(frozen=True)
class EncodedData:
    """The cached rows of a run's images and captions; picklable, every process maps the files for itself.

    Attributes:
        images: rows with `MEAN`, `PLACE` and perhaps `STD`.
        image_places: (n, 2, 2) int32, where the row of each image lies, and that of its mirrored copy.
        captions: rows with the conditions; None if there are no captions.
        caption_places: where the row of each caption lies.
    """

    images: Rows
    image_places: np.ndarray
    captions: Rows | None
    caption_places: Mapping[str, tuple[int, int]]

    def __call__(self, index: int, flip: bool, caption: str) -> tuple[Encoded, Tensor]:
        """One sample, without a batch dimension, and what `ImageTransform.place` says of its picture, (4,) int64."""
        row = self.images.read(self.image_places[index, int(flip)])
        conditions = self.captions.read(self.caption_places[caption]) if self.captions is not None else {}
        return Encoded(row[MEAN], row.get(STD), conditions), row[PLACE]
