"""The files of an audit: `audit.json`, `pairs.json` and `report.html`."""

import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.dataset import TrainingImages
from ..environment import environment
from ..files import written_beside
from .flags import SETTINGS
from .inputs.images import digest
from .inputs.ledger import of_group
from .inputs.pipelines import shown
from .measure import Measured
from .measures.memorization import closest_pairs, ratios
from .report.record import AuditRecord, ClosestPair, DataCounts, FeatureSpace
from .report.report import write_report

AUDIT, PAIRS = "audit.json", "pairs.json"


def write_outcome(folder: Path, measured: Measured, command: str | None) -> AuditRecord:
    """Writes all files into the folder, the report last, and returns what is in `audit.json`.

    `audit.json` may be published: it has no captions, no names of files and no folders. The other two hold training
    images, their captions, and the command.

    Args:
        command: the line that repeats the audit.
    """
    audit, pairs = _record(measured), _pairs(measured, folder)
    _write_json(folder / AUDIT, audit.to_json())
    _write_json(folder / PAIRS, [asdict(pair) for pair in pairs.values()])
    numbers = {pair.generated: number for number, pair in pairs.items()}

    def images_of(pair: ClosestPair) -> tuple[Image.Image, Image.Image]:
        number = numbers[pair.generated]
        ours = measured.generated.pixels.array[number]
        theirs = measured.data.references.array[measured.nearest.index[number, 0]]
        return Image.fromarray(np.asarray(ours)), Image.fromarray(np.asarray(theirs))

    write_report(folder, audit, list(pairs.values()), images_of, command)
    return audit


def _record(measured: Measured) -> AuditRecord:
    findings, data, flags = measured.findings, measured.data, measured.config.to_flags()
    return AuditRecord(
        model=measured.subject.model,
        pipeline_class=measured.pipeline_class,
        fingerprint=measured.subject.fingerprint,
        reference=measured.reference,
        date=datetime.date.today().isoformat(),
        versions=environment()["versions"],
        settings={**{name: flags[name] for name in SETTINGS}, **_clip(measured), **measured.sampling},
        training=_training(measured),
        data=DataCounts(
            training_images=len(data.training),
            distinct=len(data.references),
            exact_duplicates=data.exact,
            near_duplicates=data.near,
            heldout_images=len(data.heldout),
            generated_images=len(measured.generated.files),
            training_fingerprint=_contents(data.training),
            heldout_fingerprint=_contents(data.heldout),
        ),
        features=tuple(FeatureSpace(each.slug, each.title, each.fingerprint) for each in measured.features),
        metrics=findings.metrics,
        by_noise_level=tuple(measured.by_noise_level),
        by_repeats=tuple(measured.by_repeats),
        not_measured=findings.not_measured,
        warnings=tuple(findings.warnings),
        histograms=findings.histograms,
    )


def _training(measured: Measured) -> dict[str, Any]:
    """The run's flags, how often it saw an image, and the share of its samples that it skipped, as far as known."""
    seen = [visits.seen for visits in measured.ledger.values() if visits.seen]
    if not seen:
        return {**measured.trained_with}
    skipped = sum(visits.skipped for visits in measured.ledger.values())
    return {**measured.trained_with, "passes": int(np.median(seen)), "skipped": skipped / sum(seen)}


def _contents(images: TrainingImages) -> str:
    """A hash of the images in any order."""
    return digest(sorted(images.content_hashes))


def _clip(measured: Measured) -> dict[str, str]:
    name = measured.config.audit.clip_model
    return {} if name is None else {"clip_model": shown(name)}


def _pairs(measured: Measured, folder: Path) -> dict[int, ClosestPair]:
    """The closest pairs by the number of the generated image, in the order in which they are shown."""
    nearest, data, generated = measured.nearest, measured.data, measured.generated
    ratio = ratios(nearest) if nearest.distance.shape[1] > 1 else None
    values = generated.pixels.array[0].size
    pairs = {}
    for number in map(int, closest_pairs(nearest)):
        members = data.members[nearest.index[number, 0]]
        seen, skipped = of_group(data.training, members, measured.ledger) or (None, None)
        pairs[number] = ClosestPair(
            generated=_relative(generated.files[number], folder),
            training_name=data.training.names[members[0]],
            training_caption=data.training.captions[members[0]][0],
            prompt=generated.prompts[number],
            flipped=bool(nearest.flipped[number, 0]),
            distance=float(np.sqrt(nearest.distance[number, 0] / values)),
            ratio=None if ratio is None else float(ratio[number]),
            repeats=len(members),
            seen=seen,
            skipped=skipped,
            similarity={slug: float(each[number]) for slug, each in measured.similarity.items()},
        )
    return pairs


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)


def _write_json(path: Path, values: Any) -> None:
    with written_beside(path) as partial:
        partial.write_text(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
