"""An audit in a model card: a table for people, and `model-index` results for the Hub."""

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult

from ..audit.report.catalogue import describe, in_order
from ..audit.report.verdict import verdict

HEADING = "## Audit"


def audit_section(audit: Mapping[str, Any]) -> str:
    """The heading, the verdict, the table of figures with intervals and nulls, and the warnings of an audit.json."""
    table = "\n".join(["| metric | value | 95 % interval | null |", "| --- | ---: | ---: | ---: |", *_rows(audit)])
    data, words = audit["data"], verdict(audit)
    about = (
        f"{data['generated_images']} generated images against {data['distinct']} distinct training images and "
        f"{data['heldout_images']} held-out ones. The null is what real images that were not trained on score in the "
        "same way (of quality: what the training images score)."
    )
    findings = "\n".join(f"- {sentence.text}" for sentence in words.sentences)
    parts = [HEADING, words.headline, findings, about, table]
    if audit["warnings"]:
        parts += ["Warnings:", "\n".join(f"- {line}" for line in audit["warnings"])]
    return "\n\n".join(parts)


def _rows(audit: Mapping[str, Any]) -> Iterator[str]:
    for name, figure in _shown(audit):
        entry = describe(name)
        null = "" if figure["null"] is None else entry.show(figure["null"])
        interval = f"{entry.number(figure['low'])} to {entry.number(figure['high'])}"
        yield f"| {entry.title} | {entry.show(figure['value'])} | {interval} | {null} |"


def _shown(audit: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in in_order(audit["metrics"]):
        if not describe(name).minor:
            yield name, audit["metrics"][name]


def results(audit: Mapping[str, Any], task: str | None, dataset: str | None) -> list[EvalResult]:
    """The figures as the Hub takes them.

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
            metric_value=figure["value"],
        )
        for name, figure in _shown(audit)
    ]
