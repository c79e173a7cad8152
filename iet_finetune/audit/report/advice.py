"""What now: what would lower what an audit found, and what would let it tell more."""

from collections.abc import Iterator, Mapping

from .record import AuditRecord
from .tones import BAD, OPEN, RARE, enough_without_copy

_FEWER_PASSES = (
    "Train for fewer passes: `--holdout_fraction 0.1 --stop_when auto` stops when images that are not trained on are "
    "learned no better. Where it chose the round already, a lower `--num_train_epochs` ends sooner."
)


def advice(audit: AuditRecord, tones: Mapping[str, str]) -> Iterator[str]:
    """What to do next, the most effective first.

    Args:
        tones: of the findings, by what they are about.
    """
    if BAD in (tones.get("copies"), tones.get("extraction")):
        yield from _against_copies(audit)
    elif BAD in (tones.get("membership"), tones.get("prompts"), tones.get("similarity")):
        yield _FEWER_PASSES
        yield "More training images help, too, and in a LoRA a lower `--rank`."
    yield from _to_tell_more(audit, tones)


def _against_copies(audit: AuditRecord) -> Iterator[str]:
    repeated = [row.metrics["extracted"] for row in audit.by_repeats[1:] if "extracted" in row.metrics]
    if any(metric.count for metric in repeated):
        yield (
            "Repeated images are memorized first: `--dedup near` trains on one of each group of copies, and "
            "`iet-finetune data FOLDER` shows the groups."
        )
    yield _FEWER_PASSES
    yield (
        "`--skip_rule guard` lets images rest whose loss has fallen further than that of held-out images. "
        "`--config private_photos` does all of this."
    )


def _to_tell_more(audit: AuditRecord, tones: Mapping[str, str]) -> Iterator[str]:
    heldout, copies = audit.data.heldout_images or 0, audit.metrics.get("f_mem")
    if copies is None:
        return
    if not heldout and (tones["copies"] == OPEN or "membership" not in tones):
        yield (
            "Hold images out, so that memory can be told from chance: train with `--holdout_fraction 0.1`, or give "
            "others of the same kind as `--holdout_data_dir`."
        )
    if not copies.count and copies.high > RARE:
        enough = enough_without_copy()
        yield f"Draw more images, `--num_images {enough}`: if none of them is a copy, fewer than one in twenty are."
    if heldout and tones.get("membership") == OPEN:
        yield f"Give more than {heldout:,} held-out images: the attack by losses is then told from guessing."
