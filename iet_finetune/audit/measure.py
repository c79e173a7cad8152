"""An audit from beginning to end: the images, the pipeline, and every metric."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.config import Config
from ..data.buckets import numbers_of
from ..data.dataset import TrainingImages
from ..errors import UserError, warn
from .inputs.batches import images_at_once
from .inputs.context import AuditContext
from .inputs.dataset import AuditData, prepare
from .inputs.images import file_array, image_array, training_transform
from .inputs.ledger import LedgerCounts
from .inputs.samples import draw_samples, plan_samples
from .inputs.subject import Subject
from .inputs.work import Work
from .measures.compared import Generated, measure_clip, measure_features, measure_pixels
from .measures.features import DEFAULT_FEATURES, Features, load_features
from .measures.findings import Findings, ModelIdentity, NoiseLevel, RepeatClass
from .measures.guidance import measure_prompts
from .measures.losses import measure_losses
from .measures.memorization import repeat_classes
from .measures.metrics import Metric
from .measures.neighbours import Neighbours
from .measures.preferred import PREFERRED, preferred_features
from .request import AuditRequest
from .sources import AuditSources


@dataclass(frozen=True)
class Measured:
    """Everything an audit found out, to be written down.

    Attributes:
        config: the settings, with the resolution that was used.
        subject: the audited pipeline and its class, if there is one.
        reference: the model that membership inference was calibrated by; None without one.
        ledger: how often the run that trained the model saw and skipped each image, by its content; empty if unknown.
        trained_with: as in `AuditRequest`.
        sampling: how the images were drawn.
        nearest: training images of the generated ones.
        similarity: by the features' slug, of each generated image to the training image most similar to it.
    """

    config: Config
    subject: ModelIdentity
    pipeline_class: str | None
    reference: ModelIdentity | None
    ledger: LedgerCounts
    trained_with: Mapping[str, Any]
    sampling: dict[str, Any]
    data: AuditData
    generated: Generated
    nearest: Neighbours
    similarity: dict[str, np.ndarray]
    features: list[Features]
    findings: Findings
    by_noise_level: list[NoiseLevel]
    by_repeats: list[RepeatClass]


def measure(request: AuditRequest, sources: AuditSources, device: torch.device, silent: bool = False) -> Measured:
    """Measures everything; reuses what an interrupted audit computed.

    Raises:
        UserError: the input is wrong; the cheapest checks come first.
    """
    features = _load_features(_feature_names(request, silent), device)
    subject = sources.model.load(device) if sources.model is not None else None
    data, config = _data(request, sources, subject, work := Work(request.output / "work", silent))
    context = AuditContext(config, data, work, device)
    sampling, generated = _generate(request, context, subject, sources.generated)
    about_prompts, by_caption = measure_prompts(context, subject)
    about_losses, levels, by_loss, reference = measure_losses(context, subject, sources.reference)
    identity = ModelIdentity() if subject is None else ModelIdentity(subject.name, subject.fingerprint)
    pipeline_class = None if subject is None else subject.class_name
    # Free its memory for what follows.
    del subject
    about_pixels, nearest, extracted = measure_pixels(context, generated)
    by_features = {each.slug: measure_features(context, generated, each) for each in features}
    findings = Findings.merged(
        Findings(warnings=[*sources.warnings, *context.data.warnings]),
        about_pixels,
        *(found_out for found_out, _ in by_features.values()),
        about_losses,
        about_prompts,
        measure_clip(context, generated),
    )
    rows = {"extracted": extracted, **by_loss, "prompt_memorization": by_caption}
    return Measured(
        config=context.config,
        subject=identity,
        pipeline_class=pipeline_class,
        reference=reference if "mia_ref_auc" in findings.metrics else None,
        ledger=sources.ledger,
        trained_with=request.trained_with,
        sampling=sampling,
        data=context.data,
        generated=generated,
        nearest=nearest,
        similarity={slug: similarity for slug, (_, similarity) in by_features.items()},
        features=features,
        findings=findings,
        by_noise_level=levels,
        by_repeats=_by_repeats(context.data.repeats, rows),
    )


def _data(
    request: AuditRequest, sources: AuditSources, subject: Subject | None, work: Work
) -> tuple[AuditData, Config]:
    """The images at the resolution of the audit, without duplicates, and the settings with that resolution."""
    config, training, heldout = _fitted(_sized(request, sources, subject), subject), sources.training, sources.heldout
    if subject is not None and subject.family is not None:
        classes = (*(training.classes or (0,)), *(heldout.classes or ()))
        subject.family.take_classes(training.class_names, max(classes))
        subject.family.latent_shape(config.data.resolution)  # raises an error where it cannot be of that size
        for images in (training, heldout):
            numbers_of(images, subject.family.buckets(config.data))  # raises an error where one is too small
    grey = subject is not None and subject.is_grey
    return prepare(config, work, training, heldout, grey=grey), config


def _fitted(config: Config, subject: Subject | None) -> Config:
    """The settings with as many images at once as the GPU takes, if that is less."""
    if subject is None or not subject.travels or subject.device.type != "cuda":
        return config
    memory, asked = torch.cuda.get_device_properties(subject.device).total_memory, config.audit.eval_batch_size
    fitting = images_at_once(asked, config.data.resolution, subject.weights_to_draw, memory)
    if fitting < asked:
        warn(f"`--eval_batch_size {asked}`: {fitting} images at once fit on this GPU")
    return replace(config, audit=replace(config.audit, eval_batch_size=fitting))


def _feature_names(request: AuditRequest, silent: bool) -> tuple[str, ...]:
    """Those of `--features`, or the best that can be had; says so where better ones cannot."""
    if request.config.audit.features:
        return request.config.audit.features
    models = [
        request.model,
        request.reference.pretrained_model_name_or_path if request.reference is not None else None,
    ]
    names = preferred_features(online=any(name and not os.path.exists(name) for name in models))
    if names == DEFAULT_FEATURES and not silent:
        print(f"comparing images by {names[0]}: {PREFERRED} tells them apart better, but is not available here")
    return names


def _load_features(names: Sequence[str], device: torch.device) -> list[Features]:
    features = [load_features(name, device) for name in names]
    slugs = [each.slug for each in features]
    for name, slug in zip(names, slugs, strict=True):
        if slugs.count(slug) > 1:
            raise UserError(f"`--features {name}`: another one is called {slug} too: rename its folder or file.")
    return features


def _sized(request: AuditRequest, sources: AuditSources, subject: Subject | None) -> Config:
    """The settings with the resolution of the images, where none was given."""
    config = request.config
    if request.has_resolution:
        return config
    if subject is not None:
        size = subject.native_resolution
    else:
        assert sources.generated is not None
        size = min(sources.generated.load(0).size)
    if size is None:
        raise UserError("`--resolution` is missing: this pipeline does not say how large its images are.")
    return replace(config, data=replace(config.data, resolution=size))


def _generate(
    request: AuditRequest, context: AuditContext, subject: Subject | None, given: TrainingImages | None
) -> tuple[dict[str, Any], Generated]:
    """How images are drawn, and the images, given or drawn."""
    config, grey = context.config, subject is not None and subject.is_grey
    transform = training_transform(config, center_crop=True)
    if subject is not None and config.audit.scheduler is not None:
        subject.set_scheduler(config.audit.scheduler)
    drawing = _drawing(config, subject)
    if given is not None:
        pixels = image_array(context.work, "generated images", (given,), transform, grey)
        prompts = tuple(texts[0] for texts in given.captions)
        return drawing, Generated(pixels, tuple(Path(name) for name in given.names), prompts)
    assert subject is not None
    plan = plan_samples(config, subject, context.data.training, context.data.heldout)
    files = draw_samples(subject, plan, request.output / "samples", context.work, own=request.own)
    pixels = file_array(context.work, "generated images", files, transform, grey)
    source = config.audit.prompts if config.audit.prompts in ("train", "heldout", "none") else "a file"
    return {"num_images": len(files), "prompts": source, **drawing}, Generated(pixels, tuple(files), plan.prompts)


def _drawing(config: Config, subject: Subject | None) -> dict[str, Any]:
    """How the model draws, which measuring prompts does too; empty without a model."""
    if subject is None:
        return {}
    guidance = config.audit.sampling_guidance_scale
    return {
        "scheduler": type(subject.pipeline.scheduler).__name__,
        "num_inference_steps": config.audit.num_inference_steps,
        "sampling_guidance_scale": guidance if guidance is not None else subject.default_guidance,
        "mixed_precision": subject.precision,
    }


def _by_repeats(repeats: np.ndarray, rows: Mapping[str, Mapping[str, Metric]]) -> list[RepeatClass]:
    """One row for each class of repeats that has images."""
    return [
        RepeatClass(
            label, int(inside.sum()), {name: by_class[label] for name, by_class in rows.items() if label in by_class}
        )
        for label, inside in repeat_classes(repeats)
    ]
