"""An audit as a value: what `audit.json` holds, written and read in one place."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from ...errors import UserError, one_line
from ..measures.findings import Histogram, ModelIdentity, NoiseLevel, RepeatClass
from ..measures.metrics import Metric
from .codec import decode, encode

FORMAT, VERSION = "iet_finetune.audit", 2
# Keys of version 1 of the file, as they are called now.
_RENAMED = {"null": "baseline", "null_low": "baseline_low", "null_high": "baseline_high"}


@dataclass(frozen=True)
class DataCounts:
    """How many images there were, and hashes of them; None where that is unknown.

    Attributes:
        distinct: training images without exact and near duplicates.
    """

    training_images: int | None = None
    distinct: int | None = None
    exact_duplicates: int | None = None
    near_duplicates: int | None = None
    heldout_images: int | None = None
    generated_images: int | None = None
    training_fingerprint: str | None = None
    heldout_fingerprint: str | None = None


@dataclass(frozen=True)
class FeatureSpace:
    """The features that images were compared in; `slug` ends the names of the metrics."""

    slug: str
    title: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class ClosestPair:
    """A generated image and the training image nearest to it; a row of `pairs.json`.

    Attributes:
        generated, training_name: files, which may name folders of this machine.
        flipped: whether the mirrored generated image is nearer.
        distance: root mean square of the difference of pixels in [0, 1].
        ratio: distance over the distance to the second nearest; None if there is only one training image.
        repeats: how often the training image is in the data.
        seen, skipped: how often in training, as the ledger says; None if unknown.
        similarity: cosine similarity to the most similar training image, by slug of the features.
    """

    generated: str
    training_name: str
    training_caption: str | None
    prompt: str | None
    flipped: bool
    distance: float
    ratio: float | None
    repeats: int
    seen: int | None
    skipped: int | None
    similarity: dict[str, float]


@dataclass(frozen=True)
class AuditRecord:
    """Everything an audit measured, and under which conditions. It names no folder of this machine.

    Attributes:
        model, pipeline_class, fingerprint: of what was audited; None if only generated images were given.
        reference: the model that membership inference was calibrated by, if there was one.
        date: ISO 8601.
        versions: of this package and the libraries.
        settings: the flags that decide metrics, by name without `--`.
        training: of a model that was trained here, the flags that decide what it may remember, by name without `--`,
            `passes`, how often it saw an image, and `skipped`, the share of samples skipped; empty if unknown.
        metrics: by name, as docs/audit.md lists them.
        not_measured: name of a metric to the reason why it is missing.
        warnings: one line each.
    """

    model: str | None = None
    pipeline_class: str | None = None
    fingerprint: str | None = None
    reference: ModelIdentity | None = None
    date: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    data: DataCounts = DataCounts()
    features: tuple[FeatureSpace, ...] = ()
    metrics: dict[str, Metric] = field(default_factory=dict)
    by_noise_level: tuple[NoiseLevel, ...] = ()
    by_repeats: tuple[RepeatClass, ...] = ()
    not_measured: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of `audit.json`, version 2."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **{each.name: encode(getattr(self, each.name)) for each in fields(self)},
        }

    @classmethod
    def from_json(cls, values: Any, name: str = "the audit") -> "AuditRecord":
        """Reads the content of an `audit.json` of version 1 or 2. What is missing is empty; other keys are ignored.

        Args:
            values: what `json.load` returned.
            name: what an error calls the file.

        Raises:
            UserError: it is something else, of a later version, or damaged.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(f"{name} is not an audit of iet_finetune: give the audit.json of one.")
        version = values.get("version")
        if version not in (1, VERSION):
            raise UserError(
                f"{name} is of version {version!r}, and this program reads versions 1 and {VERSION}: update it, or "
                "audit again."
            )
        try:
            record = decode(cls, values, _RENAMED if version == 1 else {})
            for title, histogram in record.histograms.items():
                if any(len(counts) != len(histogram.edges) - 1 for counts in histogram.series.values()):
                    raise ValueError(f"`histograms.{title}` has other numbers of counts than of bins")
        except ValueError as error:
            raise UserError(f"{name} is damaged ({one_line(error)}): audit again.") from None
        return record


def read_audit(file: Path, name: str) -> AuditRecord:
    """The audit in an `audit.json`; `name` is what errors call it.

    Raises:
        UserError: it is not there, damaged, something else, or of a later version.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"), parse_constant=_not_a_number)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else one_line(error)
        raise UserError(f"{name}: {reason}: give the audit.json of an audit.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged ({one_line(error)}): audit again.") from None
    return AuditRecord.from_json(values, name)


def _not_a_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of an audit")
