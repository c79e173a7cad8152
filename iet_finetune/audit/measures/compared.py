"""Generated images compared with training images and held-out ones: by pixels, by features, and with their prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..inputs.bench import NEEDS_HELDOUT, Bench
from ..inputs.images import Pixels
from .features import Features
from .findings import Findings
from .memorization import extraction, pixel_metrics, similarity_metrics
from .metrics import Metric
from .neighbours import Neighbours, nearest_features, nearest_pixels
from .quality import OF_QUALITY, clip_findings, load_clip, quality_findings

NEIGHBOURS = 50
LEFT_RIGHT = 2  # the dimension of images (B, H, W, C) that is turned round to mirror them


class Generated(NamedTuple):
    """The pictures that are judged; a prompt is "" where none is known."""

    pixels: Pixels
    files: tuple[Path, ...]
    prompts: tuple[str, ...]


def measure_pixels(bench: Bench, generated: Generated) -> tuple[Findings, Neighbours, dict[str, Metric]]:
    """Nearest training images by pixels, and what follows from them.

    Returns:
        the figures, the neighbours of the generated images, and the share of training images that can be extracted by
        how often they are in the data.
    """
    nearest = _nearest(bench, "nearest of generated images", generated.pixels)
    null = None
    if bench.has_heldout:
        null = _nearest(bench, "nearest of held-out images", bench.material.heldout_pixels)
    extracted, by_repeats = extraction(nearest, bench.material.repeats, null)
    return (
        Findings.merged(pixel_metrics(nearest, null, len(bench.material.references)), extracted),
        nearest,
        by_repeats,
    )


def _nearest(bench: Bench, name: str, images: Pixels) -> Neighbours:
    references = bench.material.references
    count = min(NEIGHBOURS, len(references))

    def make(advance: Callable[[int], None]) -> np.ndarray:
        return np.stack(
            nearest_pixels(images.array, references.array, count, device=bench.device, progress=advance)
        ).astype(np.float64)

    made_from = {"images": images.key, "references": references.key, "count": count}
    index, distance, flipped = bench.work.array(name, made_from, make)
    return Neighbours(index.astype(np.int64), distance, flipped.astype(bool))


def measure_features(bench: Bench, generated: Generated, features: Features) -> tuple[Findings, np.ndarray]:
    """Similarity to the training images in the features of one network, and the quality against held-out images.

    Returns:
        the figures, and the similarity of each generated image to the training image that is most like it.
    """
    material = bench.material
    references = _embed(bench, features, "training images", material.references)
    ours = _embed(bench, features, "generated images", generated.pixels)
    mirrored = _embed(bench, features, "mirrored generated images", generated.pixels, mirrored=True)
    _, similarity, _ = nearest_features(ours, mirrored, references, device=bench.device)
    null, quality = None, Findings(not_measured={f"{name}_{features.slug}": NEEDS_HELDOUT for name in OF_QUALITY})
    if bench.has_heldout:
        heldout = _embed(bench, features, "held-out images", material.heldout_pixels)
        turned = _embed(bench, features, "mirrored held-out images", material.heldout_pixels, mirrored=True)
        null = nearest_features(heldout, turned, references, device=bench.device)[1][:, 0]
        quality = quality_findings(features.slug, features.title, ours, heldout, references, bench.seed)
    about = similarity_metrics(features.slug, similarity[:, 0], null, bench.seed)
    return Findings.merged(about, quality), similarity[:, 0]


def _embed(bench: Bench, features: Features, of: str, images: Pixels, mirrored: bool = False) -> np.ndarray:
    """(N, D) fp32."""

    def compute(part: range) -> np.ndarray:
        block = images.array[part.start : part.stop]
        return features(np.flip(block, LEFT_RIGHT) if mirrored else block)

    made_from: dict[str, Any] = {"images": images.key, "features": features.fingerprint, "mirrored": mirrored}
    return bench.work.rows(f"{features.slug} of {of}", made_from, len(images), compute, bench.batch)


def measure_clip(bench: Bench, generated: Generated) -> Findings:
    """How well the pictures fit their prompts, by a CLIP model, if one is given."""
    name = bench.config.audit.clip_model
    if name is None:
        return Findings(not_measured={"clip_score": "needs `--clip_model`"})
    if not any(generated.prompts):
        return Findings(not_measured={"clip_score": "needs pictures with prompts"})
    model = load_clip(name, bench.device)

    def scores(of: str, images: Pixels, captions: list[str]) -> np.ndarray:
        def compute(part: range) -> np.ndarray:
            return model.score(images.array[part.start : part.stop], captions[part.start : part.stop])

        made_from = {"images": images.key, "clip": model.fingerprint, "captions": captions}
        return bench.work.rows(f"CLIP score of {of}", made_from, len(images), compute, bench.batch)

    heldout = bench.material.heldout
    null = None
    if bench.has_heldout:
        captions = [texts[0] for texts in heldout.captions]
        null = scores("held-out images", bench.material.heldout_pixels, captions)
    return clip_findings(scores("generated images", generated.pixels, list(generated.prompts)), null, bench.seed)
