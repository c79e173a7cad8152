"""The ledger against counts kept one visit at a time."""

import math

import numpy as np
import pyarrow.parquet as pq
import torch
from tiny import save_images

from iet_finetune.config.settings import DataConfig
from iet_finetune.data.dataset import load_images
from iet_finetune.data.dedup import nothing_left_out
from iet_finetune.ensemble.ledger import ShardLedger, write_ledger


def test_it_counts_visits_and_averages_the_log_of_the_relative_loss():
    ledger = ShardLedger(3)
    nan = float("nan")
    ledger.record(
        torch.tensor([0, 2]), torch.tensor([True, False]), torch.tensor([2.0, 0.5]), torch.tensor([1.0, nan])
    )
    ledger.record(torch.tensor([2]), torch.tensor([True]), torch.tensor([0.5]), torch.tensor([1.0]))
    ledger.record(torch.tensor([0]), torch.tensor([False]), torch.tensor([8.0]), torch.tensor([1.0]))
    ledger.record(torch.tensor([0]), torch.tensor([False]), torch.tensor([math.inf]), torch.tensor([1.0]))
    assert ledger.seen.tolist() == [3, 0, 2]
    assert ledger.skipped.tolist() == [2, 0, 1]
    mean = ledger.mean_log_ratio()
    np.testing.assert_allclose(mean[[0, 2]], [(math.log(2) + math.log(8)) / 2, math.log(0.5)], rtol=1e-6)
    assert np.isnan(mean[1])


def test_the_file_has_one_row_an_image_in_the_order_of_the_data(tmp_path):
    save_images(tmp_path / "data", 5)
    data = DataConfig(train_data_dir=str(tmp_path / "data"), holdout_fraction=0.2)
    training, heldout = load_images(data, cache_dir=None, seed=0)
    ledgers = [ShardLedger(2), ShardLedger(2)]
    ledgers[1].seen += 7
    write_ledger(
        tmp_path / "ledger.parquet",
        training,
        heldout,
        nothing_left_out(training),
        [np.array([0, 3]), np.array([1, 2])],
        ledgers,
    )
    rows = pq.read_table(tmp_path / "ledger.parquet").to_pylist()
    assert [row["content_hash"] for row in rows] == [*training.content_hashes, *heldout.content_hashes]
    assert [row["shard"] for row in rows] == [0, 1, 1, 0, None]
    assert [row["seen"] for row in rows] == [0, 7, 7, 0, 0]
    assert [row["split"] for row in rows] == ["train"] * 4 + ["heldout"]
    assert all(row["mean_log_ratio"] is None for row in rows)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
