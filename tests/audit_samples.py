"""A made-up but complete audit, for tests of what is made from one."""

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from iet_finetune.audit.measures.findings import histogram
from iet_finetune.audit.measures.metrics import rate
from iet_finetune.audit.report.codec import encode
from iet_finetune.audit.report.record import AuditRecord, ClosestPair

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'too' & {{ 7*7 }} \u202e\x00</td></table>"


def even(value: float, reach: float, baseline: float | None = None) -> dict[str, Any]:
    """A metric of audit.json with an even interval."""
    return {"value": value, "low": value - reach, "high": value + reach, "baseline": baseline}


def share(count: int, total: int, baseline: float | None = None) -> dict[str, Any]:
    """A rate of audit.json."""
    return rate(count, total).against(baseline).to_json()


def sample_audit(**changes: Any) -> AuditRecord:
    """A complete audit; `changes` replace parts of its `audit.json`."""
    return AuditRecord.from_json(sample_json(**changes))


def sample_json(**changes: Any) -> dict[str, Any]:
    """A complete audit.json; `changes` replace its parts."""
    audit = {
        "format": "iet_finetune.audit",
        "version": 2,
        "model": "emoji-sd-iet",
        "pipeline_class": "StableDiffusionPipeline",
        "fingerprint": "c0ffee0123456789",
        "reference": {"model": "emoji-sd", "fingerprint": "77aa10fe93b2c4d8"},
        "date": "2026-11-25",
        "versions": {"iet_finetune": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1", "transformers": "5.23.0"},
        "settings": {
            "num_images": 1000,
            "prompts": "train",
            "num_inference_steps": 50,
            "sampling_guidance_scale": None,
            "seed": 0,
            "features": ["effnet_lite0"],
            "scheduler": "DDIMScheduler",
            "membership_draws": 8,
        },
        "training": {},
        "data": {
            "training_images": 580,
            "distinct": 300,
            "exact_duplicates": 280,
            "near_duplicates": 0,
            "heldout_images": 300,
            "generated_images": 1000,
            "training_fingerprint": "5f1d0c77a1be9e02",
            "heldout_fingerprint": "90cc41b23d5e7f18",
        },
        "features": [
            {
                "slug": "effnet_lite0",
                "title": "EfficientNet-Lite0 (ImageNet)",
                "fingerprint": "0badc0ffee123456",
            }
        ],
        "metrics": sample_metrics(),
        "by_noise_level": [
            {"level": level, "mia_auc": even(auc, 0.04, 0.5), "mia_ref_auc": even(ref, 0.03, 0.5)}
            for level, auc, ref in ((0.07, 0.61, 0.82), (0.1, 0.62, 0.84), (0.15, 0.58, 0.78), (0.25, 0.55, 0.69))
        ],
        "by_repeats": [
            {"repeats": "1", "images": 280, "extracted": share(1, 280, 0.0), "mia_auc": even(0.57, 0.04, 0.5)},
            {
                "repeats": "10 or more",
                "images": 20,
                "extracted": share(12, 20, 0.0),
                "mia_auc": even(0.94, 0.03, 0.5),
                "mia_ref_auc": even(0.98, 0.01, 0.5),
                "prompt_memorization": even(14.2, 1.1, 8.1),
            },
        ],
        "not_measured": {"clip_score": "needs `--clip_model`"},
        "warnings": ["the reference set of 300 images is small for MQ: it has a high baseline"],
        "histograms": sample_histograms(),
    }
    return audit | changes


def sample_metrics() -> dict[str, dict[str, Any]]:
    """Every metric there is, with one set of features, but the CLIP score."""
    slug = "effnet_lite0"
    return {
        "f_mem": share(23, 1000, 0.0),
        **{f"mq_{delta / 100:g}": share(delta, 1000, delta / 4000) for delta in range(15, 61, 5)},
        f"similarity_mean_{slug}": even(0.612, 0.008, 0.55),
        f"similarity_p90_{slug}": even(0.78, 0.012, 0.69),
        f"similarity_p95_{slug}": even(0.831, 0.015, 0.72),
        f"similarity_above_0.5_{slug}": share(810, 1000, 0.7),
        "extracted": share(13, 300, 0.0),
        "extracted_x1": share(1, 280, 0.0),
        "extracted_x10_up": share(12, 20, 0.0),
        "prompt_memorization": even(9.4, 0.4, 8.1),
        "prompt_memorization_auc": even(0.66, 0.04, 0.5),
        "mia_auc": even(0.603, 0.041, 0.5),
        "mia_tpr_at_1_fpr": share(14, 300, 0.01),
        "mia_ref_auc": even(0.842, 0.028, 0.5),
        "mia_ref_tpr_at_1_fpr": share(88, 300, 0.01),
        "heldout_loss": even(0.0714, 0.0021, 0.0688),
        f"kid_{slug}": even(0.0123, 0.0031, 0.0008),
        f"frechet_{slug}": even(31.42, 2.2, 21.06),
        f"precision_{slug}": share(702, 1000, 0.81),
        f"recall_{slug}": share(171, 300, 0.77),
        f"density_{slug}": even(0.802, 0.05, 0.97),
        f"coverage_{slug}": share(204, 300, 0.9),
    }


def sample_histograms() -> dict[str, dict[str, list]]:
    """Every kind of histogram."""
    rng = np.random.default_rng(0)
    ratio = np.concatenate([rng.beta(30, 5, 977), rng.uniform(0.05, 0.32, 23)])
    unit = np.linspace(0, 1, 51)
    scores = np.linspace(1.5, 4.5, 41)
    found = {
        "ratio": histogram(unit, generated=ratio, baseline=rng.beta(30, 5, 300)),
        "mq_ratio": histogram(unit, generated=rng.beta(9, 4, 1000), baseline=rng.beta(10, 4, 300)),
        "similarity_effnet_lite0": histogram(unit, generated=rng.beta(12, 7, 1000), baseline=rng.beta(11, 8, 300)),
        "mia": histogram(scores, training=rng.normal(3.1, 0.4, 300), heldout=rng.normal(2.9, 0.4, 300)),
        "prompt": histogram(np.linspace(0, 20, 31), training=rng.gamma(20, 0.45, 300), heldout=rng.gamma(20, 0.4, 60)),
    }
    return {name: encode(each) for name, each in found.items()}


def sample_pairs(count: int = 14) -> list[ClosestPair]:
    """Pairs of pairs.json; the second one's captions would be markup."""
    captions = ["a red heart with an arrow", HOSTILE, "grinning face", "a book " * 30]
    return [
        ClosestPair(
            generated=f"samples/{number:06}.png",
            training_name=f"{number:03}.png",
            training_caption=captions[number % 4] if number != 5 else None,
            prompt=captions[number % 4] if number != 6 else None,
            flipped=number % 3 == 0,
            distance=0.02 + 0.004 * number,
            ratio=0.08 + 0.02 * number,
            repeats=15 if number < 12 else 1,
            seen=240 if number != 7 else None,
            skipped=31 if number not in (7, 8) else None,
            similarity={"effnet_lite0": 0.97 - 0.01 * number},
        )
        for number in range(count)
    ]


def sample_images(pair: ClosestPair, side: int = 64) -> tuple[Image.Image, Image.Image]:
    """Two images for a pair: a disc and nearly the same disc."""
    number = int(pair.training_name.split(".")[0])
    return _disc(number, side, 0.03), _disc(number, side, 0.0)


def _disc(number: int, side: int, shift: float) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    colour = tuple(int(128 + 110 * math.sin(number + phase + shift * 5)) for phase in (0, 2, 4))
    reach, middle = side * (0.3 + 0.1 * math.sin(number)), side * (0.5 + shift)
    ImageDraw.Draw(image).ellipse([middle - reach, side / 2 - reach, middle + reach, side / 2 + reach], fill=colour)
    return image
