"""Features of small images: a network that tells garments apart, and EfficientNet at a smaller size."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iet_finetune.audit.measures.features import EfficientNetLite0, Features
from iet_finetune.audit.measures.pretrained import fingerprint_of

from .sets import array, small
from .sources import garments

CPU = torch.device("cpu")


class GarmentFeatures(Features):
    """64 numbers of a garment of 16 pixels: the last hidden layer of a small network that tells the ten classes apart.

    It is trained, once, on the 30,000 images of Fashion-MNIST that are in none of the sets, for three passes.

    Args:
        cache: the folder that its weights are kept in.
    """

    slug, title, dimensions = "garments", "features of a classifier of garments", 64

    def __init__(self, cache: Path) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self._network = nn.Sequential(
                *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Flatten(), nn.Linear(1024, self.dimensions), nn.ReLU()),
            )
            head = nn.Linear(self.dimensions, 10)
            if (file := cache / "garment-features.pt").is_file():
                self._network.load_state_dict(torch.load(file, weights_only=True))
            else:
                self._train(head)
                cache.mkdir(parents=True, exist_ok=True)
                torch.save(self._network.state_dict(), file)
        self._network.eval()
        self.fingerprint = fingerprint_of(self._network.state_dict().items(), "16")

    def _train(self, head: nn.Module) -> None:
        pictures = garments(first=30000)
        pixels = _grey(array([small(image, 16) for image in pictures.images]))
        labels = torch.from_numpy(pictures.labels)
        optimizer = torch.optim.Adam([*self._network.parameters(), *head.parameters()], 1e-3)
        for _ in range(3):
            for batch in torch.randperm(len(labels)).split(128):
                optimizer.zero_grad()
                F.cross_entropy(head(self._network(pixels[batch])), labels[batch]).backward()
                optimizer.step()

    def _encode(self, images: Sequence[np.ndarray]) -> Tensor:
        return self._network(_grey(np.stack(images)))


class SmallEfficientNet(EfficientNetLite0):
    """EfficientNet-Lite0 on images of 96 instead of 224 pixels, with a fifth of the arithmetic."""

    slug, title, size = "effnet_lite0_96", "EfficientNet-Lite0 (ImageNet) at 96 pixels", 96

    def __init__(self, cache: Path) -> None:
        super().__init__(CPU)


def _grey(images: np.ndarray) -> Tensor:
    """(N, 1, H, W) fp32 in [-1, 1]."""
    return torch.from_numpy(images[..., :1].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
