"""Prompt memorization: how far captions of training images pull the denoiser from its unconditional prediction."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from ..inputs.batches import in_parts, rows_together
from ..inputs.context import NEEDS_MODEL, AuditContext, choose
from ..inputs.dataset import AuditData
from ..inputs.images import digest
from ..inputs.samples import distinct_captions
from ..inputs.subject import Subject
from .findings import Findings
from .metrics import Metric
from .prompts import guidance_fault, prompt_by_repeats, prompt_findings, prompt_norms

# Captions a side; each costs as much as drawing an image.
PROMPTS = 200
OF_PROMPTS = ("prompt_memorization", "prompt_memorization_auc")


def measure_prompts(context: AuditContext, subject: Subject | None) -> tuple[Findings, dict[str, Metric]]:
    """The norms of the guidance of captions of training images, against those of held-out images.

    Returns:
        the metrics, and the mean norm by how often the image of the caption is in the data.
    """
    guidance = context.config.audit.sampling_guidance_scale
    reason = NEEDS_MODEL if subject is None else guidance_fault(subject.pipeline, guidance)
    if subject is None or reason is not None:
        return Findings(not_measured=dict.fromkeys(OF_PROMPTS, str(reason))), {}
    training = _chosen(distinct_captions(context.data.training), context.seed)
    known = set(distinct_captions(context.data.training))
    unknown = [text for text in distinct_captions(context.data.heldout) if text not in known]
    ours = _norms(context, subject, "training captions", training)
    theirs = None
    if heldout := _chosen(unknown, context.seed):
        theirs = _norms(context, subject, "held-out captions", heldout)
    repeats = _repeats(context.data, training)
    return prompt_findings(ours, theirs, context.seed), prompt_by_repeats(ours, repeats, context.seed)


def _repeats(data: AuditData, captions: list[str]) -> np.ndarray:
    """How often the image of each caption is in the data, (P,) int64; of several images the most repeated."""
    most: dict[str, int] = {}
    for members in data.members:
        for text in {text for number in members for text in data.training.captions[number]}:
            most[text] = max(most.get(text, 0), len(members))
    return np.array([most[text] for text in captions], dtype=np.int64)


def _chosen(captions: list[str], seed: int) -> list[str]:
    return [captions[number] for number in choose(len(captions), PROMPTS, seed)]


def _norms(context: AuditContext, subject: Subject, of: str, captions: list[str]) -> np.ndarray:
    audit, size, batch = context.config.audit, context.config.data.resolution, context.batch

    def of_batch(part: Sequence[int]) -> np.ndarray:
        return prompt_norms(
            subject.pipeline,
            subject.denoiser,
            [captions[number] for number in part],
            [context.seed + number for number in part],
            batch_size=batch,
            size=size,
            steps=audit.num_inference_steps,
            guidance=audit.sampling_guidance_scale,
            options=subject.call_options(),
        )

    def compute(part: range) -> np.ndarray:
        calls = [partial(of_batch, numbers) for numbers in in_parts(part, batch)]
        with subject.drawing(calls):
            return np.concatenate([call() for call in calls])

    made_from = {
        "model": subject.fingerprint,
        "scheduler": type(subject.pipeline.scheduler).__name__,
        "captions": digest(captions),
        "seed": context.seed,
        "steps": audit.num_inference_steps,
        "guidance": audit.sampling_guidance_scale,
        "size": size,
        "precision": subject.precision,
        "batch": batch,
        **{f"option_{name}": value for name, value in subject.options.items()},
    }
    together = rows_together(batch, subject.travels)
    return context.work.rows(f"guidance of {of}", made_from, len(captions), compute, together)
