"""Prompt memorization: how far the captions of training images pull the denoiser away from no caption."""

import numpy as np

from ..inputs.bench import NEEDS_MODEL, Bench, choose
from ..inputs.images import digest
from ..inputs.material import Material
from ..inputs.samples import autocast, distinct_captions
from ..inputs.subject import Subject
from .findings import Findings
from .metrics import Metric
from .prompts import guidance_fault, prompt_by_repeats, prompt_findings, prompt_norms

# Captions of each side: each costs as much as drawing a picture.
PROMPTS = 200
OF_PROMPTS = ("prompt_memorization", "prompt_memorization_auc")


def measure_prompts(bench: Bench, subject: Subject | None) -> tuple[Findings, dict[str, Metric]]:
    """The norms of the guidance of captions of training images, against those of held-out images.

    Returns:
        the figures, and the mean norm by how often the image of the caption is in the data.
    """
    guidance = bench.config.audit.sampling_guidance_scale
    reason = NEEDS_MODEL if subject is None else guidance_fault(subject.pipeline, guidance)
    if subject is None or reason is not None:
        return Findings(not_measured=dict.fromkeys(OF_PROMPTS, str(reason))), {}
    training = _chosen(distinct_captions(bench.material.training), bench.seed)
    known = set(distinct_captions(bench.material.training))
    unknown = [text for text in distinct_captions(bench.material.heldout) if text not in known]
    ours = _norms(bench, subject, "training captions", training)
    theirs = None
    if heldout := _chosen(unknown, bench.seed):
        theirs = _norms(bench, subject, "held-out captions", heldout)
    repeats = _repeats(bench.material, training)
    return prompt_findings(ours, theirs, bench.seed), prompt_by_repeats(ours, repeats, bench.seed)


def _repeats(material: Material, captions: list[str]) -> np.ndarray:
    """How many training images the picture of each caption is, (P,) int64; of several pictures the most repeated."""
    most: dict[str, int] = {}
    for members in material.members:
        for text in {text for number in members for text in material.training.captions[number]}:
            most[text] = max(most.get(text, 0), len(members))
    return np.array([most[text] for text in captions], dtype=np.int64)


def _chosen(captions: list[str], seed: int) -> list[str]:
    return [captions[number] for number in choose(len(captions), PROMPTS, seed)]


def _norms(bench: Bench, subject: Subject, of: str, captions: list[str]) -> np.ndarray:
    audit, size, precision = bench.config.audit, bench.config.data.resolution, bench.config.training.mixed_precision

    def compute(part: range) -> np.ndarray:
        with autocast(subject.device, precision or "no"):
            return prompt_norms(
                subject.pipeline,
                subject.denoiser,
                [captions[number] for number in part],
                [bench.seed + number for number in part],
                batch_size=bench.batch,
                size=size,
                steps=audit.num_inference_steps,
                guidance=audit.sampling_guidance_scale,
                options=subject.call_options(),
            )

    made_from = {
        "model": subject.fingerprint,
        "scheduler": type(subject.pipeline.scheduler).__name__,
        "captions": digest(captions),
        "seed": bench.seed,
        "steps": audit.num_inference_steps,
        "guidance": audit.sampling_guidance_scale,
        "size": size,
        "precision": precision or "no",
        "batch": bench.batch,
        **{f"told_{name}": value for name, value in subject.told.items()},
    }
    return bench.work.rows(f"guidance of {of}", made_from, len(captions), compute, bench.batch)
