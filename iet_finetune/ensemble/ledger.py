"""The ledger: for every image of the run, how often it was seen and skipped, and how low its loss was."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from ..data.dataset import TrainingImages
from ..data.dedup import LeftOut
from ..files import written_beside


class ShardLedger(nn.Module):
    """The ledger of one shard, kept on the device and read once at the end.

    Attributes:
        seen, skipped: (n,) int64, visits, and visits without gradient, of each of the shard's images.
        log_ratio_sum, log_ratio_count: (n,) fp32, of log(loss / expected loss of its timestep) over the visits whose
            timestep already had an expected loss.
    """

    seen: Tensor
    skipped: Tensor
    log_ratio_sum: Tensor
    log_ratio_count: Tensor

    def __init__(self, num_images: int) -> None:
        super().__init__()
        for name, dtype in (("seen", torch.int64), ("skipped", torch.int64)):
            self.register_buffer(name, torch.zeros(num_images, dtype=dtype))
        for name in ("log_ratio_sum", "log_ratio_count"):
            self.register_buffer(name, torch.zeros(num_images))

    @torch.no_grad()
    def record(self, members: Tensor, keep: Tensor, loss: Tensor, expected_loss: Tensor) -> None:
        """Enters one step; `members` (B,) are indices in the shard, each at most once, the others (B,) as in AGC."""
        log_ratio = (loss / expected_loss).log()
        known = log_ratio.abs() < math.inf
        self.seen.index_add_(0, members, torch.ones_like(members))
        self.skipped.index_add_(0, members, (~keep).to(self.skipped.dtype))
        self.log_ratio_sum.index_add_(0, members, torch.where(known, log_ratio, 0.0))
        self.log_ratio_count.index_add_(0, members, known.to(self.log_ratio_count.dtype))

    def mean_log_ratio(self) -> np.ndarray:
        """(n,) the mean of log(loss / expected loss); NaN for an image without a comparable visit."""
        return (self.log_ratio_sum / self.log_ratio_count).cpu().numpy()


def write_ledger(
    path: Path,
    training: TrainingImages,
    heldout: TrainingImages,
    left_out: LeftOut,
    shards: Sequence[np.ndarray],
    ledgers: Sequence[ShardLedger],
    about: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Writes `ledger.parquet`: a row an image: training images in the order of the data, held-out, left-out ones.

    `copies` says for how many images one that was trained on stands, and `copy_of` of which one, by its content hash,
    a left-out one is a copy.

    Args:
        about: further columns, (N,) of the training images, by name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = _training_columns(len(training), shards, ledgers)
    others = len(heldout) + len(left_out.images)
    stand_ins = [training.content_hashes[number] for number in left_out.stand_in]
    parts = (training, heldout, left_out.images)
    splits = ["train"] * len(training) + ["heldout"] * len(heldout) + ["copy"] * len(stand_ins)
    table = pa.table(
        {
            "content_hash": pa.array([each for part in parts for each in part.content_hashes]),
            "image": pa.array([name for part in parts for name in part.names]),
            "split": pa.array(splits),
            "shard": pa.array([*columns["shard"].tolist(), *[None] * others], type=pa.int32()),
            "seen": pa.array([*columns["seen"].tolist(), *[0] * others], type=pa.int64()),
            "skipped": pa.array([*columns["skipped"].tolist(), *[0] * others], type=pa.int64()),
            "mean_log_ratio": pa.array(
                [*_none_for_nan(columns["mean_log_ratio"]), *[None] * others], type=pa.float32()
            ),
            "copies": pa.array([*left_out.copies.tolist(), *[None] * others], type=pa.int64()),
            **{name: pa.array([*values.tolist(), *[None] * others]) for name, values in about.items()},
            "copy_of": pa.array([*[None] * (len(training) + len(heldout)), *stand_ins], type=pa.string()),
        }
    )
    # Opened here: of a name, pyarrow would take `a:b` for an address and `~` for a home folder.
    with written_beside(path) as partial, partial.open("wb") as stream:
        pq.write_table(table, stream)


def _training_columns(
    num_images: int, shards: Sequence[np.ndarray], ledgers: Sequence[ShardLedger]
) -> dict[str, np.ndarray]:
    columns = {name: np.zeros(num_images, dtype=np.int64) for name in ("shard", "seen", "skipped")}
    columns["mean_log_ratio"] = np.full(num_images, np.nan, dtype=np.float32)
    for shard, (indices, ledger) in enumerate(zip(shards, ledgers, strict=True)):
        columns["shard"][indices] = shard
        columns["seen"][indices] = ledger.seen.cpu().numpy()
        columns["skipped"][indices] = ledger.skipped.cpu().numpy()
        columns["mean_log_ratio"][indices] = ledger.mean_log_ratio()
    return columns


def _none_for_nan(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
