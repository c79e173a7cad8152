"""The page on adding a rule: its merge rule and its sharding train a pipeline from outside of the package."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from e2e.command import ROOT
from ranks import Ended, run_ranks
from runs import assert_equal, run_until
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, save_tiny_sd

from iet_finetune import Config, Trainer, UserError
from iet_finetune.config.registry import REGISTRIES
from iet_finetune.training.mergers import merge_rule

PROGRAMS = {
    re.search(r"@(\w+)\(", program)[1]: program
    for program in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add-a-rule.md").read_text(), flags=re.DOTALL)
}
RULES = {"merge_rule": "trimmed", "shard_strategy": "by_caption"}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Both programs have been imported, and are forgotten after the test."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "entries", dict(registry.entries))
    for kind in ("register_merge_rule", "register_sharding"):
        exec(PROGRAMS[kind], {"__name__": "outside"})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 8)
    return folder


def config(world: Path, output: Path, **flags) -> Config:
    """Three clones, of which two ranks train two at once and then one; two rounds of a step each."""
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"),
        "train_data_dir": str(world / "data"),
        "output_dir": str(output),
        "resolution": RESOLUTION,
        "train_batch_size": 4,
        "num_shards": 3,
        "merge_every_steps": 1,
        "max_train_steps": 2,
        "lr_warmup_steps": 0,
        "learning_rate": 1e-2,
        "use_ema": True,
        "checkpointing_steps": 1,
        "report_to": "none",
        **RULES,
    }
    return Config.from_flags(**{**defaults, **flags})


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "unet/diffusion_pytorch_model.safetensors")


# Registers what the pages' programs do, and is killed, on all ranks, after so many checkpoints.
ON_RANKS = """
sys.stdout = sys.stderr
for program in json.loads(os.environ["PROGRAMS"]):
    exec(program, {"__name__": "outside"})
from iet_finetune import Config, Trainer
from iet_finetune.ensemble.checkpoint import CheckpointStore
trainer = Trainer(Config.from_flags(**json.loads(os.environ["FLAGS"])))
save, left = trainer.store.save, int(os.environ["CHECKPOINTS"])
def save_or_die(*args, **settings):
    nonlocal left
    path, left = save(*args, **settings), left - 1
    if not left:
        while not path.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return path
trainer.store.save = save_or_die
trainer.train()
"""


def train_on_two(settings: Config, checkpoints: int = -1) -> list[Ended]:
    programs = json.dumps([PROGRAMS[kind] for kind in ("register_merge_rule", "register_sharding")])
    flags = json.dumps(settings.to_flags())
    shared = {"ACCELERATE_USE_CPU": "true", "FLAGS": flags, "PROGRAMS": programs, "CHECKPOINTS": str(checkpoints)}
    environments = {rank: {**shared, "LOCAL_RANK": str(rank)} for rank in (0, 1)}
    return run_ranks(ON_RANKS, 2, environments=environments)


def test_both_rules_give_the_same_bits_on_one_rank_and_two_killed_and_resumed(world, tmp_path):
    Trainer(config(world, tmp_path / "whole")).train()
    # One rank is gone in the middle of the second round, with one clone collected.
    run_until(config(world, tmp_path / "resumed"), 5)
    newest = json.loads((tmp_path / "resumed/checkpoint-4/manifest.json").read_text())["pieces"]
    assert {"denoiser_weights.pt", "denoiser_clone-00000-00001-of-00001.safetensors"} <= newest.keys()
    Trainer(config(world, tmp_path / "resumed", resume_from_checkpoint="latest")).train()
    # Two ranks are gone after the first two clones of a round; two others go on.
    killed = train_on_two(config(world, tmp_path / "two"), checkpoints=1)
    assert -signal.SIGKILL in [end.code for end in killed], killed
    resumed = train_on_two(config(world, tmp_path / "two", resume_from_checkpoint="latest"))
    assert [end.code for end in resumed] == [0, 0], resumed
    for output in ("resumed", "two"):
        assert_equal(weights(tmp_path / output), weights(tmp_path / "whole"))
    ledger = pq.read_table(tmp_path / "whole/ledger.parquet").to_pydict()
    assert sorted(ledger["shard"]) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_the_rule_of_the_page_is_a_trimmed_mean_and_leaves_a_clone_out_that_went_astray():
    rule = merge_rule(Config.from_flags(merge_rule="trimmed"))
    clones = torch.randn(5, 100)
    merged = rule.merge(clones, torch.ones(5), torch.zeros(100))
    expected = np.sort(clones.double().numpy(), axis=0)[1:4].mean(axis=0)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12)
    clones[2] = 1e9
    assert rule.merge(clones, torch.ones(5), torch.zeros(100)).abs().max() < 10


def test_a_merge_rule_does_not_go_with_the_exact_merge_of_adapters():
    with pytest.raises(UserError, match="`--merge_rule trimmed` does not go with `--lora_merge exact`"):
        Config.from_flags(merge_rule="trimmed", use_lora=True)
    Config.from_flags(merge_rule="trimmed", use_lora=True, lora_merge="average")


def test_a_sharding_that_leaves_images_out_ends_in_one_line(world, tmp_path, monkeypatch):
    lost = {"__name__": "outside"}
    exec(
        PROGRAMS["register_sharding"].replace('"by_caption"', '"lost"').replace("(len(images))", "(1, len(images))"),
        lost,
    )
    with pytest.raises(UserError, match=r"`--shard_strategy lost`: image 0 is in 0 shards"):
        Trainer(config(world, tmp_path / "out", shard_strategy="lost"))
