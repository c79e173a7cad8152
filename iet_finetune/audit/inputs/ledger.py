"""The ledger of the run that trained the model: which images it saw, and how often."""

from pathlib import Path

import numpy as np
import pyarrow.parquet

from ...data.dataset import TrainingImages

LedgerCounts = dict[str, tuple[int, int]]


def read_ledger(file: Path | None) -> LedgerCounts:
    """Content hash -> how often all copies of an image were seen and skipped in training; empty without a ledger."""
    if file is None or not file.is_file():
        return {}
    table = pyarrow.parquet.read_table(file, columns=["content_hash", "seen", "skipped"]).to_pylist()
    sums: LedgerCounts = {}
    for row in table:
        seen, skipped = sums.get(row["content_hash"], (0, 0))
        sums[row["content_hash"]] = seen + row["seen"], skipped + row["skipped"]
    return sums


def of_group(images: TrainingImages, members: np.ndarray, ledger: LedgerCounts) -> tuple[int, int] | None:
    """How often a group of images was seen and skipped in total; None if one is not in the ledger."""
    hashes = {images.content_hashes[number] for number in members}
    if not hashes <= ledger.keys():
        return None
    return sum(ledger[each][0] for each in hashes), sum(ledger[each][1] for each in hashes)


def check_split(
    training: TrainingImages, heldout: TrainingImages, ledger: LedgerCounts
) -> tuple[TrainingImages, tuple[str, ...]]:
    """Drops held-out images that the model was trained on, and warns where the data is not that of the run.

    Without a ledger it keeps all of them.
    """
    if not ledger:
        return heldout, ()
    trained = {content for content, (seen, _) in ledger.items() if seen}
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
            "that is said of training images says too little."
        )
    return heldout.subset(unseen), tuple(warnings)
