"""What an audit leaves behind: `audit.json`, `pairs.json` and `report.html`."""

import datetime
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..data.dataset import TrainingImages
from ..environment import environment
from ..files import written_beside
from .inputs.images import digest
from .inputs.seen import Seen, of_group
from .inputs.subject import shown
from .measure import Measured
from .measures.memorization import closest_pairs, ratios
from .report.report import write_report

AUDIT, PAIRS = "audit.json", "pairs.json"
FORMAT, VERSION = "iet_finetune.audit", 1
# What was set, without what names a folder of this machine.
SETTINGS = (
    *("resolution", "center_crop", "image_interpolation_mode", "max_train_samples", "holdout_fraction", "seed"),
    *("membership_images", "membership_draws", "eval_batch_size"),
)


class Pair(NamedTuple):
    """A generated image and the training image it is nearest to: their numbers, and what is said of them."""

    generated: int
    reference: int
    facts: dict[str, Any]


def write_outcome(folder: Path, measured: Measured, command: str) -> dict[str, Any]:
    """Writes all files into the folder, the report last, and returns what is in `audit.json`.

    `audit.json` may be shown to anybody: there are no captions, no names of files and no folders in it. The other two
    hold training images, their captions, and what was typed.

    Args:
        command: the line that repeats the audit.
    """
    audit, pairs = _audit(measured), _pairs(measured, folder, measured.ledger)
    _write_json(folder / AUDIT, audit)
    _write_json(folder / PAIRS, [pair.facts for pair in pairs])
    pictures = {pair.facts["generated"]: pair for pair in pairs}

    def picture(facts: dict[str, Any]) -> tuple[Image.Image, Image.Image]:
        pair = pictures[facts["generated"]]
        ours = measured.generated.pixels.array[pair.generated]
        theirs = measured.material.references.array[pair.reference]
        return Image.fromarray(np.asarray(ours)), Image.fromarray(np.asarray(theirs))

    write_report(folder, audit | {"command": command}, [pair.facts for pair in pairs], picture)
    return audit


def _audit(measured: Measured) -> dict[str, Any]:
    findings, material, flags = measured.findings, measured.material, measured.config.to_flags()
    return {
        "format": FORMAT,
        "version": VERSION,
        **measured.subject,
        "reference": measured.reference,
        "date": datetime.date.today().isoformat(),
        "versions": environment()["versions"],
        "settings": {**{name: flags[name] for name in SETTINGS}, **_clip(measured), **measured.sampling},
        "data": {
            "training_images": len(material.training),
            "distinct": len(material.references),
            "exact_duplicates": material.exact,
            "near_duplicates": material.near,
            "heldout_images": len(material.heldout),
            "generated_images": len(measured.generated.files),
            "training_fingerprint": _contents(material.training),
            "heldout_fingerprint": _contents(material.heldout),
        },
        "features": [
            {"slug": each.slug, "title": each.title, "fingerprint": each.fingerprint} for each in measured.features
        ],
        "metrics": {name: metric.to_json() for name, metric in findings.metrics.items()},
        "by_noise_level": measured.by_noise_level,
        "by_repeats": measured.by_repeats,
        "not_measured": findings.not_measured,
        "warnings": findings.warnings,
        "histograms": findings.histograms,
    }


def _contents(images: TrainingImages) -> str:
    """The same for the same images in any order."""
    return digest(sorted(images.content_hashes))


def _clip(measured: Measured) -> dict[str, str]:
    name = measured.config.audit.clip_model
    return {} if name is None else {"clip_model": shown(name)}


def _pairs(measured: Measured, folder: Path, ledger: Seen) -> list[Pair]:
    nearest, material, generated = measured.nearest, measured.material, measured.generated
    ratio = ratios(nearest) if nearest.distance.shape[1] > 1 else None
    values = generated.pixels.array[0].size
    pairs = []
    for number in closest_pairs(nearest):
        reference = int(nearest.index[number, 0])
        members = material.members[reference]
        told = of_group(material.training, members, ledger)
        facts = {
            "generated": _relative(generated.files[number], folder),
            "training_name": material.training.names[members[0]],
            "training_caption": material.training.captions[members[0]][0],
            "prompt": generated.prompts[number],
            "flipped": bool(nearest.flipped[number, 0]),
            "distance": float(np.sqrt(nearest.distance[number, 0] / values)),
            "ratio": None if ratio is None else float(ratio[number]),
            "repeats": len(members),
            "seen": told[0] if told is not None else None,
            "skipped": told[1] if told is not None else None,
            "similarity": {slug: float(values[number]) for slug, values in measured.similarity.items()},
        }
        pairs.append(Pair(int(number), reference, facts))
    return pairs


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)


def _write_json(path: Path, values: Any) -> None:
    with written_beside(path) as partial:
        partial.write_text(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
