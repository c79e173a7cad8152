"""The paper's table: quality and memorization of several models, from their audits."""

from collections.abc import Mapping, Sequence

from running import print_table

from iet_finetune.audit.measures.metrics import Metric
from iet_finetune.audit.report.catalogue import Entry, describe
from iet_finetune.audit.report.comparison import difference
from iet_finetune.audit.report.record import AuditRecord

OURS, PLAIN, PLAIN_STEPS = "IET-AGC", "plain", "plain, steps of a clone"
# {} stands for features: the first of an audit for the quality, the last for similarity.
QUALITY = ("frechet_{}", "kid_{}")
SIMILARITY = ("similarity_mean_{}", "similarity_p90_{}", "similarity_p95_{}", "similarity_above_0.5_{}")


def print_table_of(title: str, audits: Mapping[str, AuditRecord], memorization: Sequence[str]) -> None:
    """Prints the table of some models, IET-AGC and the plain one among them.

    Args:
        title: of the data set.
        audits: by model.
        memorization: names of metrics, with {} for the slug of their features.
    """
    images = audits[OURS].data.generated_images
    print(f"\n{title}: {images:,} generated images a model; in brackets 95 % intervals")
    measures = (*QUALITY, *memorization)
    print_table([_row(measure, audits) for measure in measures])
    print("FD is a Fréchet distance in the features that it names, and no FID. The baseline is the same measure of")
    print("held-out images, of the quality that of training images.")
    for model, audit in audits.items():
        for measure in measures:
            if reason := audit.not_measured.get(_name(measure, audit)):
                print(f"{model}: {describe(_name(measure, audit)).title} was not measured: {reason}")


def _name(measure: str, audit: AuditRecord) -> str:
    return measure.format(audit.features[0 if measure in QUALITY else -1].slug)


def _row(measure: str, audits: Mapping[str, AuditRecord]) -> dict[str, str]:
    """A line of the table: the measure of each model, its baseline, and how much lower it is with IET-AGC."""
    entry = describe(_name(measure, audits[OURS]))
    values = {model: audit.metrics.get(_name(measure, audit)) for model, audit in audits.items()}
    ours, plain = values[OURS], values[PLAIN]
    row = {"": entry.title, **{model: _shown(entry, value) for model, value in values.items()}}
    row["baseline"] = _baseline(entry, ours)
    apart = difference(plain, ours) if plain and ours else None
    row["IET-AGC minus plain"] = "-" if apart is None else _bracketed(entry, apart.value, apart.low, apart.high)
    row["lower by"] = "-"
    if plain and ours and plain.value > 0:
        row["lower by"] = f"{round(100 * (1 - ours.value / plain.value))} %"
    return row


def _shown(entry: Entry, metric: Metric | None) -> str:
    return "-" if metric is None else _bracketed(entry, metric.value, metric.low, metric.high)


def _baseline(entry: Entry, metric: Metric | None) -> str:
    """The baseline of a measure, with an interval where it has one of its own."""
    if metric is None or metric.baseline is None:
        return "-"
    if metric.baseline_low is None or metric.baseline_high is None:
        return entry.show(metric.baseline)
    return _bracketed(entry, metric.baseline, metric.baseline_low, metric.baseline_high)


def _bracketed(entry: Entry, value: float, low: float, high: float) -> str:
    return f"{entry.show(value)} [{entry.number(low)}, {entry.number(high)}]"
