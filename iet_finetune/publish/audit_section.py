"""An audit in a model card: a table for people, and `model-index` results for the Hub."""

from huggingface_hub import EvalResult

from ..audit.report.catalogue import describe, in_order
from ..audit.report.record import AuditRecord
from ..audit.report.summary import main_rows
from ..audit.report.verdict import verdict

HEADING = "## Audit"


def audit_section(audit: AuditRecord) -> str:
    """The heading, the verdict, the table of metrics with intervals and baselines, and the warnings."""
    rows = [f"| {' | '.join(row)} |" for row in main_rows(audit)]
    table = "\n".join(["| metric | value | 95 % interval | baseline |", "| --- | ---: | ---: | ---: |", *rows])
    data, words = audit.data, verdict(audit)
    about = (
        f"{data.generated_images} generated images against {data.distinct} distinct training images and "
        f"{data.heldout_images} held-out ones. The baseline is the same measurement on real images that were not "
        "trained on; for quality, on the training images."
    )
    findings = "\n".join(f"- {sentence.text}" for sentence in words.sentences)
    parts = [HEADING, words.headline, findings, about, table]
    if audit.warnings:
        parts += ["Warnings:", "\n".join(f"- {line}" for line in audit.warnings)]
    return "\n\n".join(parts)


def results(audit: AuditRecord, task: str | None, dataset: str | None) -> list[EvalResult]:
    """The metrics as the Hub takes them.

    Args:
        task: the card's `pipeline_tag`.
        dataset: id of the training data on the Hub; None if it is not there.
    """
    return [
        EvalResult(
            task_type=task or "unconditional-image-generation",
            dataset_type=dataset or "imagefolder",
            dataset_name=dataset or "training and held-out images",
            metric_type=name,
            metric_name=describe(name).title,
            metric_value=audit.metrics[name].value,
        )
        for name in in_order(audit.metrics)
        if not describe(name).minor
    ]
