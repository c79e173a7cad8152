"""Under which conditions audits were made, and where these differ so that figures cannot be compared."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Settings that decide no figure, or that something else in an audit says better.
_FREE = ("model", "output_dir", "compare", "train_data_dir", "holdout_data_dir", "num_images", "eval_batch_size")


def differing_conditions(labels: Sequence[str], audits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line for each condition in which an audit differs from the first, or from some other.

    Args:
        labels: what the audits are called.
        audits: the contents of their audit.json.
    """
    data = [audit.get("data", {}) for audit in audits]
    for side in ("training", "heldout"):
        prints = [each.get(f"{side}_fingerprint") for each in data]
        if len(set(map(str, prints))) > 1:
            words = "held-out" if side == "heldout" else side
            yield f"the {words} images differ: {_listed(labels, [_short(each) for each in prints])}"
    for name in ("generated_images", "heldout_images"):
        yield from _differing(
            f"number of {name.split('_')[0].replace('heldout', 'held-out')} images", labels, data, name
        )
    yield from _features(labels, audits)
    yield from _references(labels, audits)
    settings = [{name.lstrip("-"): value for name, value in audit.get("settings", {}).items()} for audit in audits]
    for name in dict.fromkeys(name for each in settings for name in each if name not in _FREE):
        yield from _differing(f"`--{name}`", labels, settings, name)
    versions = [audit.get("versions", {}) for audit in audits]
    for name in sorted({name for each in versions for name in each}):
        yield from _differing(f"version of {name}", labels, versions, name)


def _features(labels: Sequence[str], audits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Features that go by the same slug and are not the same."""
    by_slug = [
        {str(each.get("slug")): each.get("fingerprint") for each in audit.get("features", [])} for audit in audits
    ]
    for slug in dict.fromkeys(slug for each in by_slug for slug in each):
        having = [(label, each[slug]) for label, each in zip(labels, by_slug, strict=True) if slug in each]
        if len({str(each) for _, each in having}) > 1:
            names, prints = zip(*having, strict=True)
            yield f"the features {slug} are not the same: {_listed(names, [_short(each) for each in prints])}"


def _references(labels: Sequence[str], audits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Membership inference that was calibrated by other models."""
    named = zip(labels, (audit.get("reference") for audit in audits), strict=True)
    found = [(label, each) for label, each in named if isinstance(each, Mapping)]
    if len({str(each.get("fingerprint")) for _, each in found}) > 1:
        shown = [f"{each.get('model')} {_short(each.get('fingerprint'))}" for _, each in found]
        yield f"the reference models differ: {_listed([label for label, _ in found], shown)}"


def _differing(words: str, labels: Sequence[str], tables: Sequence[Mapping[str, Any]], name: str) -> Iterator[str]:
    values = [table.get(name) for table in tables]
    if any(value != values[0] for value in values):
        yield f"the {words} differs: {_listed(labels, ['none' if v is None else str(v) for v in values])}"


def _listed(labels: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{value} ({label})" for label, value in zip(labels, values, strict=True))


def _short(fingerprint: Any) -> str:
    return "none" if fingerprint is None else str(fingerprint)[:12]
