"""How well generated images match their prompts, by CLIP."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, AutoTokenizer

from ...errors import UserError
from ...families.base import in_chunks
from .features import BATCH_SIZE, check_images
from .findings import Findings
from .metrics import mean
from .pretrained import fingerprint_of, load_model, load_part, plain_settings, pooled, repeatable, stored_weights


class ClipScorer:
    """CLIP as a judge of how well images fit captions (Hessel et al., 2021, without their factor of 2.5).

    Own code: torchmetrics' CLIPScore takes a fixed list of models, and features in a form that transformers no longer
    gives.

    Args:
        name: Hub id or folder of a CLIP model with its image processor and tokenizer.
        device: where it runs.
        flag: what the name was given as, for errors.

    Attributes:
        fingerprint: hexadecimal hash of the weights, the vocabulary and how images are prepared.

    Raises:
        UserError: there is no such model, or it is not complete.
    """

    def __init__(self, name: str, device: torch.device | str, flag: str = "--clip_model") -> None:
        self._processor = load_part(AutoImageProcessor, name, flag, "CLIP model", backend="pil")
        self._tokenizer = load_part(AutoTokenizer, name, flag, "CLIP model")
        model, _ = load_model(name, flag, "CLIP model")
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise UserError(
                f"`{flag} {name}` is a {type(model).__name__}: give a model of images and texts, such as CLIP."
            )
        settings = {**model.config.to_dict(), "processor": self._processor.to_dict()}
        words = self._tokenizer.get_vocab()
        self.fingerprint = fingerprint_of(stored_weights(model, set()), plain_settings(settings), words)
        self._model = model.to(device)
        self._device = torch.device(device)

    def score(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """100 · max(cosine of the features of image and caption, 0), as in torchmetrics, for each pair.

        Args:
            images: (B, H, W, 3) uint8.
            captions: B of them; what is beyond the model's number of tokens is cut off.

        Returns:
            (B,) float32.

        Raises:
            ValueError: there are not as many captions as images, or the images have another shape or dtype.
        """
        check_images(images)
        if len(images) != len(captions):
            raise ValueError(f"{len(captions)} captions for {len(images)} images")
        if len(images) == 0:
            return np.zeros(0, np.float32)
        with torch.inference_mode(), repeatable():
            pairs = list(zip(images, captions, strict=True))
            (scores,) = in_chunks(lambda chunk: (self._score(chunk),), pairs, BATCH_SIZE)
        return scores.numpy()

    def _score(self, pairs: Sequence[tuple[np.ndarray, str]]) -> Tensor:
        inputs = self._processor(images=[Image.fromarray(image) for image, _ in pairs], return_tensors="pt")
        texts = self._tokenizer(
            [caption for _, caption in pairs],
            padding="max_length",
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        of_images = pooled(self._model.get_image_features(**inputs.to(self._device)))
        of_texts = pooled(self._model.get_text_features(**texts.to(self._device)))
        return (100 * cosine_similarity(of_images.float(), of_texts.float())).clamp(min=0).cpu()


def load_clip(name: str, device: torch.device | str) -> ClipScorer:
    """The model that `--clip_model NAME` names; errors as those of `ClipScorer`."""
    return ClipScorer(name, device)


def clip_findings(generated_scores: np.ndarray, baseline_scores: np.ndarray | None, seed: int) -> Findings:
    """`clip_score`, the mean over generated images and their prompts.

    Args:
        generated_scores: (G,) of `ClipScorer.score`.
        baseline_scores: (H,) of held-out images with their own captions.
        seed: of the bootstrap.
    """
    if len(generated_scores) == 0:
        return Findings(not_measured={"clip_score": "needs generated images with prompts, and there are none"})
    baseline = (
        None
        if baseline_scores is None or len(baseline_scores) == 0
        else float(np.mean(baseline_scores, dtype=np.float64))
    )
    return Findings({"clip_score": mean(np.asarray(generated_scores, np.float64), seed).against(baseline)})
