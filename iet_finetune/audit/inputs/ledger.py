"""The ledger of the run that trained the model: which images it saw, and how often."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet

from ...data.dataset import TrainingImages


class Visits(NamedTuple):
    """What became of an image, all copies of its content together.

    Attributes:
        seen, skipped: visits, and visits without gradient.
        stood_in_for: whether it was left out as a copy of another one, which was trained on.
    """

    seen: int
    skipped: int
    stood_in_for: bool


LedgerCounts = dict[str, Visits]


def read_ledger(file: Path | None) -> LedgerCounts:
    """Content hash -> what became of that image in training; empty without a ledger."""
    if file is None or not file.is_file():
        return {}
    # Opened here: of a name, pyarrow would take `a:b` for an address.
    with file.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as table:
        # Ledgers of earlier versions name no copies.
        wanted = {"content_hash", "seen", "skipped", "copy_of"} & {*table.schema_arrow.names}
        rows = table.read(columns=sorted(wanted)).to_pylist()
    sums: LedgerCounts = {}
    for row in rows:
        before = sums.get(row["content_hash"], Visits(0, 0, False))
        copy = before.stood_in_for or row.get("copy_of") is not None
        sums[row["content_hash"]] = Visits(before.seen + row["seen"], before.skipped + row["skipped"], copy)
    return sums


def of_group(images: TrainingImages, members: np.ndarray, ledger: LedgerCounts) -> tuple[int, int] | None:
    """How often a group of images was seen and skipped in total; None if one is not in the ledger."""
    hashes = {images.content_hashes[number] for number in members}
    if not hashes <= ledger.keys():
        return None
    return sum(ledger[each].seen for each in hashes), sum(ledger[each].skipped for each in hashes)


def check_split(
    training: TrainingImages, heldout: TrainingImages, ledger: LedgerCounts
) -> tuple[TrainingImages, tuple[str, ...]]:
    """Drops held-out images that the model was trained on, and warns where the data is not that of the run.

    Without a ledger it keeps all of them.
    """
    if not ledger:
        return heldout, ()
    trained = {content for content, visits in ledger.items() if visits.seen or visits.stood_in_for}
    unseen = [number for number, content in enumerate(heldout.content_hashes) if content not in trained]
    warnings = []
    if known := len(heldout) - len(unseen):
        warnings.append(
            f"{known} of {len(heldout)} held-out images were trained on, as the ledger of the run says: they were "
            "left out."
        )
    if strangers := sum(content not in trained for content in training.content_hashes):
        warnings.append(
            f"{strangers} of {len(training)} training images were not trained on, as the ledger of the run says: all "
            "results about training images are too low."
        )
    return heldout.subset(unseen), tuple(warnings)
