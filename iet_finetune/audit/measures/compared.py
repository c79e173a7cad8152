"""Compares generated images with training and held-out images: by pixels, by features, and with their prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..inputs.context import NEEDS_HELDOUT, AuditContext
from ..inputs.images import Pixels
from .features import Features
from .findings import Findings
from .memorization import extraction, pixel_metrics, similarity_metrics
from .metrics import Metric
from .neighbours import Neighbours, nearest_features, nearest_pixels
from .quality import OF_QUALITY, clip_findings, load_clip, quality_findings

NEIGHBOURS = 50
LEFT_RIGHT = 2  # the dimension of images (B, H, W, C) that mirroring flips


class Generated(NamedTuple):
    """The generated images; an unknown prompt is ""."""

    pixels: Pixels
    files: tuple[Path, ...]
    prompts: tuple[str, ...]


def measure_pixels(context: AuditContext, generated: Generated) -> tuple[Findings, Neighbours, dict[str, Metric]]:
    """The nearest training images by pixels, and the metrics that follow.

    Returns:
        the metrics, the neighbours of the generated images, and the share of training images that can be extracted by
        how often they are in the data.
    """
    nearest = _nearest(context, "nearest of generated images", generated.pixels)
    baseline = None
    if context.has_heldout:
        baseline = _nearest(context, "nearest of held-out images", context.data.heldout_pixels)
    extracted, by_repeats = extraction(nearest, context.data.repeats, baseline)
    return (
        Findings.merged(pixel_metrics(nearest, baseline, len(context.data.references)), extracted),
        nearest,
        by_repeats,
    )


def _nearest(context: AuditContext, name: str, images: Pixels) -> Neighbours:
    references = context.data.references
    count = min(NEIGHBOURS, len(references))

    def make(advance: Callable[[int], None]) -> np.ndarray:
        return np.stack(
            nearest_pixels(images.array, references.array, count, device=context.device, progress=advance)
        ).astype(np.float64)

    made_from = {"images": images.key, "references": references.key, "count": count}
    index, distance, flipped = context.work.array(name, made_from, make)
    return Neighbours(index.astype(np.int64), distance, flipped.astype(bool))


def measure_features(context: AuditContext, generated: Generated, features: Features) -> tuple[Findings, np.ndarray]:
    """Similarity to the training images in the features of one network, and the quality against held-out images.

    Returns:
        the metrics, and the similarity of each generated image to the training image that is most like it.
    """
    data = context.data
    references = _embed(context, features, "training images", data.references)
    ours = _embed(context, features, "generated images", generated.pixels)
    mirrored = _embed(context, features, "mirrored generated images", generated.pixels, mirrored=True)
    _, similarity, _ = nearest_features(ours, mirrored, references, device=context.device)
    baseline, quality = None, Findings(not_measured={f"{name}_{features.slug}": NEEDS_HELDOUT for name in OF_QUALITY})
    if context.has_heldout:
        heldout = _embed(context, features, "held-out images", data.heldout_pixels)
        turned = _embed(context, features, "mirrored held-out images", data.heldout_pixels, mirrored=True)
        baseline = nearest_features(heldout, turned, references, device=context.device)[1][:, 0]
        quality = quality_findings(features.slug, features.title, ours, heldout, references, context.seed)
    about = similarity_metrics(features.slug, similarity[:, 0], baseline, context.seed)
    return Findings.merged(about, quality), similarity[:, 0]


def _embed(context: AuditContext, features: Features, of: str, images: Pixels, mirrored: bool = False) -> np.ndarray:
    """(N, D) fp32."""

    def compute(part: range) -> np.ndarray:
        block = images.array[part.start : part.stop]
        return features(np.flip(block, LEFT_RIGHT) if mirrored else block)

    made_from: dict[str, Any] = {"images": images.key, "features": features.fingerprint, "mirrored": mirrored}
    return context.work.rows(f"{features.slug} of {of}", made_from, len(images), compute, context.batch)


def measure_clip(context: AuditContext, generated: Generated) -> Findings:
    """How well the images match their prompts, by a CLIP model, if one is given."""
    name = context.config.audit.clip_model
    if name is None:
        return Findings(not_measured={"clip_score": "needs `--clip_model`"})
    if not any(generated.prompts):
        return Findings(not_measured={"clip_score": "needs images with prompts"})
    model = load_clip(name, context.device)

    def scores(of: str, images: Pixels, captions: list[str]) -> np.ndarray:
        def compute(part: range) -> np.ndarray:
            return model.score(images.array[part.start : part.stop], captions[part.start : part.stop])

        made_from = {"images": images.key, "clip": model.fingerprint, "captions": captions}
        return context.work.rows(f"CLIP score of {of}", made_from, len(images), compute, context.batch)

    heldout = context.data.heldout
    baseline = None
    if context.has_heldout:
        captions = [texts[0] for texts in heldout.captions]
        baseline = scores("held-out images", context.data.heldout_pixels, captions)
    return clip_findings(scores("generated images", generated.pixels, list(generated.prompts)), baseline, context.seed)
