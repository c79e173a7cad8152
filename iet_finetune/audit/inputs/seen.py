"""What the ledger of the run that trained a model says: which images it was trained on, and how often."""

from pathlib import Path

import numpy as np
import pyarrow.parquet

from ...data.dataset import TrainingImages

Seen = dict[str, tuple[int, int]]


def read_ledger(file: Path | None) -> Seen:
    """Content hash -> how often all copies of an image were seen and skipped in training; empty without a ledger."""
    if file is None or not file.is_file():
        return {}
    table = pyarrow.parquet.read_table(file, columns=["content_hash", "seen", "skipped"]).to_pylist()
    sums: Seen = {}
    for row in table:
        seen, skipped = sums.get(row["content_hash"], (0, 0))
        sums[row["content_hash"]] = seen + row["seen"], skipped + row["skipped"]
    return sums


def of_group(images: TrainingImages, members: np.ndarray, ledger: Seen) -> tuple[int, int] | None:
    """How often the images of a group were seen and skipped, all together; None if the ledger does not know one."""
    hashes = {images.content_hashes[number] for number in members}
    if not hashes <= ledger.keys():
        return None
    return sum(ledger[each][0] for each in hashes), sum(ledger[each][1] for each in hashes)


def check_split(
    training: TrainingImages, heldout: TrainingImages, ledger: Seen
) -> tuple[TrainingImages, tuple[str, ...]]:
    """The held-out images without those that the model was trained on, and warnings where the data is not the run's.

    Without a ledger all of them, and none.
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
