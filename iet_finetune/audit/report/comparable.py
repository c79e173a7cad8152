"""The conditions under which audits were made, and where they differ so that metrics cannot be compared."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...config.config import all_flags
from .record import AuditRecord

# Settings that no metric depends on, or that other parts of an audit cover.
_FREE = {
    *("model", "compare", "num_images"),
    *(name for name, spec in all_flags().items() if spec.is_per_machine or spec.audit == "noted"),
}


def differing_conditions(labels: Sequence[str], audits: Sequence[AuditRecord]) -> Iterator[str]:
    """One line for each condition in which the audits, called by their labels, are not all the same."""
    data = [vars(audit.data) for audit in audits]
    for side, words in (("training", "training"), ("heldout", "held-out")):
        prints = [each[f"{side}_fingerprint"] for each in data]
        if len(set(prints)) > 1:
            yield f"the {words} images differ: {_listed(labels, [_short(each) for each in prints])}"
    for name, words in (("generated_images", "generated"), ("heldout_images", "held-out")):
        yield from _differing(f"number of {words} images", labels, data, name)
    yield from _features(labels, audits)
    yield from _references(labels, audits)
    # An audit of a version without a flag was made as its default says.
    defaults = {name: spec.default for name, spec in all_flags().items()}
    settings = [defaults | {name.lstrip("-"): value for name, value in audit.settings.items()} for audit in audits]
    named = dict.fromkeys(name.lstrip("-") for audit in audits for name in audit.settings)
    for name in (name for name in named if name not in _FREE):
        yield from _differing(f"`--{name}`", labels, settings, name)
    for name in sorted({name for audit in audits for name in audit.versions}):
        yield from _differing(f"version of {name}", labels, [audit.versions for audit in audits], name)


def _features(labels: Sequence[str], audits: Sequence[AuditRecord]) -> Iterator[str]:
    """Features of the same slug that are not the same."""
    by_slug = [{each.slug: each.fingerprint for each in audit.features} for audit in audits]
    for slug in dict.fromkeys(slug for each in by_slug for slug in each):
        having = [(label, each[slug]) for label, each in zip(labels, by_slug, strict=True) if slug in each]
        if len({each for _, each in having}) > 1:
            names, prints = zip(*having, strict=True)
            yield f"the features {slug} are not the same: {_listed(names, [_short(each) for each in prints])}"


def _references(labels: Sequence[str], audits: Sequence[AuditRecord]) -> Iterator[str]:
    """Membership inference that was calibrated by other models."""
    found = [(label, each.reference) for label, each in zip(labels, audits, strict=True) if each.reference is not None]
    if len({each.fingerprint for _, each in found}) > 1:
        shown = [f"{each.model} {_short(each.fingerprint)}" for _, each in found]
        yield f"the reference models differ: {_listed([label for label, _ in found], shown)}"


def _differing(words: str, labels: Sequence[str], tables: Sequence[Mapping[str, Any]], name: str) -> Iterator[str]:
    values = [table.get(name) for table in tables]
    if any(value != values[0] for value in values):
        yield f"the {words} differs: {_listed(labels, ['none' if v is None else str(v) for v in values])}"


def _listed(labels: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{value} ({label})" for label, value in zip(labels, values, strict=True))


def _short(fingerprint: str | None) -> str:
    return "none" if fingerprint is None else fingerprint[:12]
