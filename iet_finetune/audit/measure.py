"""An audit from beginning to end: the images, the pipeline, and every figure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.config import Config
from ..config.settings import ModelConfig
from ..data.dataset import load_folder
from ..data.image_folder import find_files, is_metadata
from ..data.images import decode_rgb
from ..data.samples import read_file
from ..ensemble.ledger import LEDGER
from ..errors import UserError
from .inputs.bench import Bench
from .inputs.images import file_array, image_array, training_transform
from .inputs.material import Material, load_real_images, prepare
from .inputs.samples import draw_samples, plan_samples
from .inputs.seen import Seen, check_split, read_ledger
from .inputs.subject import Found, Subject, find_subject
from .inputs.work import Work
from .measures.compared import Generated, measure_clip, measure_features, measure_pixels
from .measures.features import Features, load_features
from .measures.findings import Findings
from .measures.guidance import measure_prompts
from .measures.losses import measure_losses
from .measures.memorization import REPEATS
from .measures.metrics import Metric
from .measures.neighbours import Neighbours


@dataclass(frozen=True)
class Judged:
    """What is audited, and against what.

    Attributes:
        config: with `audit`, `data`, and how pipelines are loaded.
        model: Hub id or folder of the pipeline, or of a LoRA file; None judges `--generated_dir` alone.
        reference: the pipeline that membership inference is calibrated by, and how it is loaded; None goes without.
        reference_is_wish: whether the reference was asked for; one that was only assumed may be missing.
        split_is_known: whether the model is known to have been trained without the share that is held out.
        has_resolution: whether `--resolution` was given; if not, it is that of the pipeline's own pictures.
        output: where the audit, and the pictures that are drawn, are kept.
        own: whether that folder is of this model alone.
        ledger: where that of the run lies, if the model was trained here.
    """

    config: Config
    model: str | None
    reference: ModelConfig | None
    reference_is_wish: bool
    split_is_known: bool
    has_resolution: bool
    output: Path
    own: bool

    @property
    def ledger(self) -> Path | None:
        return None if self.model is None else Path(self.model) / LEDGER


@dataclass(frozen=True)
class Measured:
    """All that an audit found out, for what is written down.

    Attributes:
        subject: name and class of the pipeline, if there is one.
        reference: name and fingerprint of the model that membership inference was calibrated by; None without one.
        ledger: how often the run that trained the model saw and skipped each image, by its content; empty if unknown.
        sampling: how the pictures were drawn.
        nearest: of the generated images among the references.
        similarity: by the features' slug, of each generated image to the reference that is most like it.
        by_repeats: class of repeats, how many references are in it, and their figures.
    """

    config: Config
    subject: dict[str, Any]
    reference: dict[str, Any] | None
    ledger: Seen
    sampling: dict[str, Any]
    material: Material
    generated: Generated
    nearest: Neighbours
    similarity: dict[str, np.ndarray]
    features: list[Features]
    findings: Findings
    by_noise_level: list[dict[str, Any]]
    by_repeats: list[dict[str, Any]]


def measure(judged: Judged, device: torch.device, silent: bool = False) -> Measured:
    """Does the whole audit; what an interrupted one has computed is taken up.

    Raises:
        UserError: whatever the user can mend, the cheapest mistakes first.
    """
    subject, loaded = _load(judged, device, Work(judged.output / "work", silent))
    bench, calibrator = loaded.bench, dict[str, Any]()
    sampling, generated = _generate(judged, bench, subject)
    about_prompts, by_caption = measure_prompts(bench, subject)
    about_losses, levels, by_loss = measure_losses(bench, subject, _loader(loaded.reference, device, calibrator))
    described = _described(subject)
    # Whatever comes now needs the memory more.
    del subject
    about_pixels, nearest, extracted = measure_pixels(bench, generated)
    by_features = {each.slug: measure_features(bench, generated, each) for each in loaded.features}
    findings = Findings.merged(
        Findings(warnings=loaded.warnings),
        about_pixels,
        *(found_out for found_out, _ in by_features.values()),
        about_losses,
        about_prompts,
        measure_clip(bench, generated),
    )
    rows = {"extracted": extracted, **by_loss, "prompt_memorization": by_caption}
    return Measured(
        config=bench.config,
        subject=described,
        reference=calibrator if "mia_ref_auc" in findings.metrics else None,
        ledger=loaded.ledger,
        sampling=sampling,
        material=bench.material,
        generated=generated,
        nearest=nearest,
        similarity={slug: similarity for slug, (_, similarity) in by_features.items()},
        features=loaded.features,
        findings=findings,
        by_noise_level=levels,
        by_repeats=_by_repeats(bench.material.repeats, rows),
    )


@dataclass(frozen=True)
class _Loaded:
    """All but the pipeline that is audited, which does not stay until the end."""

    bench: Bench
    features: list[Features]
    reference: Found | None
    ledger: Seen
    warnings: list[str]


def _load(judged: Judged, device: torch.device, work: Work) -> tuple[Subject | None, _Loaded]:
    """What is judged and what it is compared with: names first, then images, then weights."""
    config = judged.config
    if judged.model is None and config.audit.generated_dir is None:
        raise UserError("nothing to judge: give `--model DIR_OR_HUB_ID`, or `--generated_dir FOLDER`.")
    found = find_subject(config, judged.model, "model") if judged.model is not None else None
    reference = _find_reference(judged)
    needs_captions = config.audit.clip_model is not None or (found is not None and found.needs_captions)
    training, heldout = load_real_images(config, needs_captions)
    ledger = read_ledger(judged.ledger)
    heldout, about_split = check_split(training, heldout, ledger)
    features = _load_features(config, device)
    subject = found.load(device) if found is not None else None
    config = _sized(judged, subject)
    if subject is not None and subject.family is not None:
        classes = (*(training.classes or (0,)), *(heldout.classes or ()))
        subject.family.take_classes(training.class_names, max(classes))
        subject.family.latent_shape(config.data.resolution)  # or it cannot be of that size
    material = prepare(config, work, training, heldout, grey=subject is not None and subject.is_grey)
    warnings = [*_doubts(judged, ledger), *about_split, *material.warnings]
    return subject, _Loaded(Bench(config, material, work, device), features, reference, ledger, warnings)


def _doubts(judged: Judged, ledger: Seen) -> list[str]:
    data, audit = judged.config.data, judged.config.audit
    if ledger or judged.split_is_known or not data.holdout_fraction or audit.holdout_data_dir is not None:
        return []
    return [
        f"the held-out images are {data.holdout_fraction:g} of the data, and there is no record that the model was "
        "trained without them: if it was not, all that is compared with them says too little."
    ]


def _load_features(config: Config, device: torch.device) -> list[Features]:
    features = [load_features(name, device) for name in config.audit.features]
    slugs = [each.slug for each in features]
    for name, slug in zip(config.audit.features, slugs, strict=True):
        if slugs.count(slug) > 1:
            raise UserError(f"`--features {name}`: another one is called {slug} too: rename its folder or file.")
    return features


def _find_reference(judged: Judged) -> Found | None:
    if judged.reference is None or judged.model is None:
        return None
    config = replace(judged.config, model=judged.reference)
    try:
        return find_subject(config, str(judged.reference.pretrained_model_name_or_path), "reference_model")
    except UserError:
        if judged.reference_is_wish:
            raise
        return None


def _loader(reference: Found | None, device: torch.device, told: dict[str, Any]) -> Callable[[], Subject] | None:
    """What loads the reference model, if there is one, and then notes which it is."""
    if reference is None:
        return None

    def load() -> Subject:
        subject = reference.load(device)
        told.update(model=subject.name, fingerprint=subject.fingerprint)
        return subject

    return load


def _sized(judged: Judged, subject: Subject | None) -> Config:
    """The settings with the resolution of the pictures, where none was given."""
    config = judged.config
    if judged.has_resolution:
        return config
    size = subject.native_resolution if subject is not None else _size_of_first(str(config.audit.generated_dir))
    if size is None:
        raise UserError("`--resolution` is missing: this pipeline does not say how large its pictures are.")
    return replace(config, data=replace(config.data, resolution=size))


def _size_of_first(folder: str) -> int:
    file = next((path for path in find_files(folder) if not is_metadata(path)), None)
    if file is None:
        raise UserError(f"`--generated_dir {folder}` has no images. Give the folder that holds them.")
    return min(decode_rgb(read_file(file), file).size)


def _generate(judged: Judged, bench: Bench, subject: Subject | None) -> tuple[dict[str, Any], Generated]:
    """The pictures, given or drawn, and how they were drawn."""
    config, grey = bench.config, subject is not None and subject.is_grey
    transform = training_transform(config, center_crop=True)
    if subject is not None and config.audit.scheduler is not None:
        subject.set_scheduler(config.audit.scheduler)
    if config.audit.generated_dir is not None:
        return _drawing(config, subject), _given(config.audit.generated_dir, bench, grey)
    assert subject is not None
    plan = plan_samples(config, subject, bench.material.training, bench.material.heldout)
    files = draw_samples(subject, plan, judged.output / "samples", bench.work, own=judged.own)
    pixels = file_array(bench.work, "generated images", files, transform, grey)
    sampling = {
        "num_images": len(files),
        "prompts": config.audit.prompts if config.audit.prompts in ("train", "heldout", "none") else "a file",
        **_drawing(config, subject),
    }
    return sampling, Generated(pixels, tuple(files), plan.prompts)


def _drawing(config: Config, subject: Subject | None) -> dict[str, Any]:
    """How a picture is drawn from a prompt, for what is measured meanwhile too; nothing without a model."""
    if subject is None:
        return {}
    guidance = config.audit.sampling_guidance_scale
    return {
        "scheduler": type(subject.pipeline.scheduler).__name__,
        "num_inference_steps": config.audit.num_inference_steps,
        "sampling_guidance_scale": guidance if guidance is not None else subject.default_guidance,
        "mixed_precision": config.training.mixed_precision or "no",
    }


def _given(folder: str, bench: Bench, grey: bool) -> Generated:
    """The images of `--generated_dir`, with their prompts if there is a metadata file that has them."""
    config, captions = bench.config, any(is_metadata(path) for path in find_files(folder))
    data = replace(config.data, class_column=None)
    images = load_folder("generated_dir", folder, data, captions=captions)
    transform = training_transform(config, center_crop=True)
    pixels = image_array(bench.work, "generated images", (images,), transform, grey)
    prompts = tuple(texts[0] for texts in images.captions)
    return Generated(pixels, tuple(Path(name) for name in images.names), prompts)


def _described(subject: Subject | None) -> dict[str, Any]:
    if subject is None:
        return {"model": None, "pipeline_class": None, "fingerprint": None}
    return {"model": subject.name, "pipeline_class": subject.class_name, "fingerprint": subject.fingerprint}


def _by_repeats(repeats: np.ndarray, rows: Mapping[str, Mapping[str, Metric]]) -> list[dict[str, Any]]:
    """One row for each class of repeats that has references."""
    table = []
    for label, low, high in REPEATS:
        count = int(((repeats >= low) & (repeats <= high)).sum())
        if count:
            figures = {name: by_class[label].to_json() for name, by_class in rows.items() if label in by_class}
            table.append({"repeats": label, "images": count, **figures})
    return table
