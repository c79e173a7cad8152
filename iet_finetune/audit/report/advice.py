"""What now: what would lower what an audit found, and what would let it tell more."""

from collections.abc import Iterator, Mapping
from typing import Any

from .record import AuditRecord
from .tones import BAD, OPEN, RARE, enough_without_copy

_STOPS = "`--holdout_fraction 0.1 --stop_when auto` stops once the model gets no better on held-out images."


def advice(audit: AuditRecord, tones: Mapping[str, str]) -> Iterator[str]:
    """What to do next, the most effective first; nothing that the run did already.

    Args:
        tones: of the findings, by what they are about.
    """
    if BAD in (tones.get("copies"), tones.get("extraction")):
        yield from _against_copies(audit)
    elif BAD in (tones.get("membership"), tones.get("prompts"), tones.get("similarity")):
        yield _fewer_passes(audit.training)
        yield _more_images(audit.training)
    yield from _to_tell_more(audit, tones)


def _against_copies(audit: AuditRecord) -> Iterator[str]:
    run = audit.training
    repeated = [row.metrics["extracted"] for row in audit.by_repeats[1:] if "extracted" in row.metrics]
    if any(metric.count for metric in repeated) and run.get("dedup") != "near":
        yield (
            "Repeated images are memorized first: `--dedup near` trains on one image of each group of copies, and "
            "`iet-finetune data FOLDER` shows the groups."
        )
    yield _fewer_passes(run)
    if run.get("skip_rule") != "guard":
        yield (
            "`--skip_rule guard` skips an image once its loss has fallen further than those of held-out images. "
            "`--config private_photos` does all of this."
        )
    elif run.get("stop_when") == "auto":
        yield _more_images(run)


def _fewer_passes(run: Mapping[str, Any]) -> str:
    passes = run.get("passes")
    if run.get("stop_when") != "auto":
        than = f"fewer passes than {passes}" if passes else "fewer passes"
        return f"Train for {than}: {_STOPS}"
    if passes and passes > 1:
        return (
            f"Train for fewer passes: `--stop_when auto` kept the model as it was after {passes}; `--num_train_epochs "
            f"{passes // 2}` ends sooner."
        )
    return "Train for fewer passes: a lower `--num_train_epochs` ends before `--stop_when auto` does."


def _more_images(run: Mapping[str, Any]) -> str:
    rank = run.get("rank")
    if run.get("use_lora") is False or rank == 1:
        return "Add training images: each of them is then remembered less."
    below = f"a `--rank` below {rank}" if rank else "in a LoRA a lower `--rank`"
    return f"Add training images, or try {below}: single images are then remembered less."


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
        yield (
            f"Compare with more than {heldout:,} held-out images, so that the attack by losses can be told from "
            "guessing: train with a higher `--holdout_fraction`, or give others as `--holdout_data_dir`."
        )
