"""Calibrated AGC in a run: alike on any number of ranks and after a stop, and without a second denoiser."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from runs import assert_close, assert_equal, run_until, train_on_ranks
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, save_tiny_sd, tiny_sd

from iet_finetune import Config, Trainer, UserError

IMAGES = 12
# So that images are skipped in the few passes of a test.
CALIBRATED = {"calibrated_tau": 0.2, "calibrated_below": 1.0, "calibrated_visits": 1, "calibrated_cap": 0.5}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with the pipeline `base`, and `data`: 12 images."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base")
    save_images(folder / "data", IMAGES)
    return folder


def config(world: Path, output: Path, skip_rule: str = "calibrated_agc", **flags) -> Config:
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"), "train_data_dir": str(world / "data"),
        "output_dir": str(output), "skip_rule": skip_rule, **(CALIBRATED if skip_rule == "calibrated_agc" else {}),
        "resolution": RESOLUTION, "train_batch_size": 2, "num_shards": 2, "num_train_epochs": 4,
        "merge_every_epochs": 2, "lr_warmup_steps": 0, "learning_rate": 3e-3, "adam_epsilon": 1e-2,
        "report_to": "none", "checkpointing_steps": 4,
    }  # fmt: skip
    return Config.from_flags(**{**defaults, **flags})


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


def ledger(output: Path) -> dict[str, list]:
    return pq.read_table(output / "ledger.parquet").to_pydict()


LORA = {"use_lora": True, "rank": 2, "lora_export": "fuse", "learning_rate": 0.05}


@pytest.mark.parametrize("extra", [{}, {**LORA, "calibrated_every": 2}], ids=["full", "lora, every second pass"])
def test_the_bits_are_the_same_on_two_ranks_and_after_a_stop(world, tmp_path, extra):
    Trainer(config(world, tmp_path / "one", **extra)).train()
    for ended in train_on_ranks(2, config(world, tmp_path / "two", **extra)):
        assert ended.code == 0, ended.stderr
    assert_equal(weights(tmp_path / "one"), weights(tmp_path / "two"))
    # Stopped in the midst of a pass, of the second round.
    run_until(config(world, tmp_path / "stopped", **extra), 17)
    Trainer(config(world, tmp_path / "stopped", resume_from_checkpoint="latest", **extra)).train()
    assert_equal(weights(tmp_path / "one"), weights(tmp_path / "stopped"))
    ledgers = [ledger(tmp_path / name) for name in ("one", "two", "stopped")]
    assert ledgers[0] == ledgers[1] == ledgers[2]
    assert 0 < sum(ledgers[0]["skipped"]) <= IMAGES / 2 * 3
    assert None not in ledgers[0]["mean_log_ratio"]


def test_ranks_that_train_a_clone_together_know_each_others_references(world, tmp_path):
    # The last micro-batch leaves one of the ranks without a sample.
    flags = {"num_shards": 1, "train_batch_size": 3, "max_train_samples": 10}
    for ended in train_on_ranks(2, config(world, tmp_path / "two", **flags)):
        assert ended.code == 0, ended.stderr
    Trainer(config(world, tmp_path / "one", **flags)).train()
    assert_close(weights(tmp_path / "one"), weights(tmp_path / "two"), tolerance=5e-6)
    ours, theirs = ledger(tmp_path / "one"), ledger(tmp_path / "two")
    assert ours["skipped"] == theirs["skipped"]
    assert sum(ours["skipped"]) > 0
    assert ours["mean_log_ratio"] == pytest.approx(theirs["mean_log_ratio"], abs=1e-4)


def test_a_learning_rate_of_0_changes_nothing(world, tmp_path):
    Trainer(config(world, tmp_path / "out", learning_rate=0.0)).train()
    assert_equal(weights(tmp_path / "out"), tiny_sd().unet.state_dict())
    # The base loses what the clones do.
    assert ledger(tmp_path / "out")["mean_log_ratio"] == pytest.approx([0.0] * IMAGES, abs=1e-5)


def test_where_nothing_is_skipped_it_is_plain_training(world, tmp_path):
    for name, flags in {"none": {"calibrated_tau": 1e6}, "plain": {"skip_rule": "agc", "agc_threshold": 0.0}}.items():
        Trainer(config(world, tmp_path / name, num_train_epochs=2, **flags)).train()
    assert_equal(weights(tmp_path / "none"), weights(tmp_path / "plain"))


def test_with_lora_there_is_no_second_denoiser(world, tmp_path):
    trainer = Trainer(config(world, tmp_path / "out", **LORA))
    trainer.train_rounds()
    (lent,) = trainer.run.lender._lent.values()
    lends = sum(value.nbytes for value in lent.values.values())
    adapter = sum(parameter.nbytes for parameter in trainer.model.trainable.parameters.values())
    assert adapter <= lends <= adapter + trainer.model.adapter.nbytes
    assert lends < sum(parameter.nbytes for parameter in trainer.model.family.denoiser.parameters()) / 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"calibrated_tau": 0.0}, "`--calibrated_tau` must be above 0, not 0.0."),
        ({"calibrated_decay": 1.0}, "`--calibrated_decay` must be in [0, 1), not 1.0."),
        ({"calibrated_visits": 0}, "`--calibrated_visits` must be at least 1"),
        ({"calibrated_cap": 1.5}, "`--calibrated_cap` must be in (0, 1], not 1.5."),
        ({"calibrated_below": 0.0}, "`--calibrated_below` must be in (0, 1], not 0.0."),
        ({"calibrated_every": 0}, "`--calibrated_every` must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(flags, words):
    with pytest.raises(UserError) as caught:
        Config.from_flags(**flags)
    assert words in str(caught.value)
