"""`iet-finetune plan` says what a run would do and take, from a few of its steps, and leaves nothing behind."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from e2e.command import words
from tiny import RESOLUTION, save_images, save_tiny_sd

from iet_finetune import Config, Trainer, UserError, cli
from iet_finetune.data.encoded import Encoded
from iet_finetune.distributed.placement import Placement
from iet_finetune.ensemble.budget import Need
from iet_finetune.method.schedule import Schedule
from iet_finetune.planning import estimate
from iet_finetune.planning.plan import Machine, NumRanks, make_plan
from iet_finetune.planning.trial import Needs, Trial, _row_sizes, shortened
from iet_finetune.planning.words import doubts
from iet_finetune.planning.words import lines as in_lines
from iet_finetune.training.data import find_images


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=20)
    save_images(folder / "data", 40)
    return folder


def flags(world: Path, **more) -> dict:
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"), "train_data_dir": str(world / "data"),
        "output_dir": str(world / "never"), "resolution": RESOLUTION, "num_shards": 4, "train_batch_size": 2,
        "gradient_accumulation_steps": 2, "num_train_epochs": 6, "merge_every_epochs": 2, "lr_warmup_steps": 0,
        "holdout_fraction": 0.2, "validation_prompts": ["thing 1", "thing 2"], "validation_inference_steps": 8,
        "num_validation_images": 2, "validation_rounds": 2, "cache_dir": str(world / "cache"),
    }  # fmt: skip
    return {**defaults, **more}


def config_of(world: Path, **more) -> Config:
    return Config.from_flags(**flags(world, **more))


@pytest.fixture(scope="module")
def plan(world):
    return make_plan(config_of(world))


def test_it_says_what_runs_what_it_needs_and_how_long_it_takes(plan, world):
    told = [line.partition(":")[0] for line in in_lines(config_of(world), plan)]
    assert told[:-1] == ["images", "captions", "steps", "output", "curves", "memory", "disk", "cache", "time"]
    assert told[-1].startswith("measured here with 8 steps of 2 clones")
    assert "training" in plan.seconds
    assert set(plan.host) >= {
        "reading",
        "loading",
        "encoding",
        "preparing",
        "drawing",
        "training",
        "merging",
        "saving",
    }
    assert set(plan.disk) == {"4 checkpoints", "the result"}, "three rounds, and one more while it is written"
    assert plan.device == {}


def test_it_counts_what_is_encoded_with_mirrored_copies_and_each_caption_once(plan, world):
    latent, states = plan.trial.rows
    found = find_images(config_of(world), True)
    captions = {text for images in (found.images, found.watched) for texts in images.captions for text in texts}
    assert latent > 0 < states
    assert plan.cache == latent * 40 + states * len(captions)
    shard = SimpleNamespace(encoded=Encoded(torch.zeros(4, 8, 8), torch.zeros(4, 8, 8), {"x": torch.zeros(12, 32)}))
    sample = type("Shard", (), {"__getitem__": lambda self, visit: shard})()
    assert _row_sizes(sample, mirrored=True) == (2 * 2 * 4 * 4 * 64, 4 * 12 * 32)


def test_it_leaves_nothing_but_the_cache(plan, world):
    assert not (world / "never").exists()
    assert sorted(path.name for path in world.iterdir()) == ["base", "cache", "data"]


def test_it_warns_of_a_rule_that_cannot_act(plan):
    assert any("AGC can hardly skip anything" in doubt for doubt in doubts(plan))
    assert not any(line.startswith("skip rule") for line in plan.about)


def test_what_does_not_suffice_is_said(plan):
    def said(**machine) -> list[str]:
        there = Machine(**{"memory": 1 << 40, "disk": 1 << 40, "gpu": None, "ranks": NumRanks(), **machine})
        return [
            line for line in doubts(replace(plan, machine=there, device={"training": 23 << 30})) if "AGC" not in line
        ]

    assert said() == said(gpu=25 << 30) == []
    (line,) = said(memory=1000)
    assert line.startswith("there is not enough memory: ")
    half = max(plan.host.values()) + 1
    assert said(memory=half) == []
    assert len(said(memory=half, ranks=NumRanks(4, 2))) == 1
    assert said(gpu=24 << 30) == ["the GPU may not have enough memory: 24.70 GB of 25.76 GB are needed"]
    (line,) = said(disk=1000)
    assert line.endswith("`--checkpoints_total_limit 1`")


def test_what_is_tried_is_the_run_with_fewer_images_steps_and_clones(world, tmp_path):
    config = config_of(world, use_ema=True, learning_rate=0.5, dedup="exact", audit=True)
    small = shortened(config, find_images(config, True), tmp_path)
    changed = {name for name, value in small.to_flags().items() if value != config.to_flags()[name]}
    assert changed == {
        *("output_dir", "report_to", "audit", "dedup", "num_shards", "max_train_samples", "max_train_steps"),
        *("merge_every_steps", "merge_every_epochs", "logging_steps", "checkpointing_steps"),
        *("checkpoints_total_limit", "validation_prompts", "validation_inference_steps"),
    }
    assert small.data.max_train_samples == 30, "24 for 2 clones' 3 steps of 4 images, and a fifth is held out"


def test_a_rule_that_compares_gets_the_held_out_images_that_it_needs(world, tmp_path):
    config = config_of(world, skip_rule="guard", train_batch_size=1, holdout_fraction=0.25)
    small = shortened(config, find_images(config, True), tmp_path)
    assert small.data.max_train_samples >= 36, "9 held-out ones are a quarter of 36"


def a_trial(**more) -> Trial:
    """Two clones, in two rounds of three steps, of which two are timed: 4 images and 1 second each."""
    config = Config.from_flags(
        num_shards=2, validation_inference_steps=4, num_validation_images=2, merge_every_steps=3, **more
    )
    seconds = {
        "reading": [1.0], "loading": [5.0], "preparing": [4.0], "encoding": [6.0], "drawing": [9.0, 8.0],
        "looking": [0.0, 0.0, 0.0, 0.5], "training": [60.0, 5.0, 5.0, 5.0], "merging": [7.0, 7.0, 1.0, 2.0],
        "saving": [9.0, 3.0, 11.0],
    }  # fmt: skip
    needs = Needs(Need(host=100, checkpoint=10), Need(host=700, checkpoint=40))
    host = {"loading": 1000, "training": 900}
    return Trial(config, 8, 32, 8.0, seconds, host, encoded=12, result=5, needs=needs)


def test_the_whole_is_made_of_what_was_measured_as_often_as_it_happens():
    whole = Config.from_flags(
        num_shards=8, validation_inference_steps=16, num_validation_images=2, validation_prompts=["a", "b", "c"],
        validation_rounds=5, checkpointing_steps=100,
    )  # fmt: skip
    # 8 clones of 10 images, 3 steps a pass; 12 passes, merged after every second.
    schedule = Schedule.plan((10,) * 8, 4, num_train_epochs=12, merge_every_epochs=2)
    found = estimate.seconds(whole, a_trial(), schedule, Placement.plan(8, 1), 80)
    assert found == pytest.approx({
        "getting ready": 10,
        "encoding": 6 / 12 * 80,
        "training": 960 / 4 + 6 * 8 * (5 - 3),
        "merging": 6 * 8 * 1.5,
        "looking at losses": 6 * 0.5 * 160 / 12,
        "checkpoints": (6 + 288 // 100) * 3 * 4,
        "validation images": 4 * 2 * 3 * 3 * 4,
        "saving the result": 11,
    })  # fmt: skip
    halved = estimate.seconds(whole, a_trial(), schedule, Placement.plan(8, 2), 80)
    assert halved["training"] == pytest.approx(found["training"] / 2)
    assert halved["merging"] == pytest.approx(found["merging"] / 2)


def test_memory_counts_the_clones_that_were_not_tried_and_disk_the_checkpoints_that_are_kept():
    host = estimate.memory(a_trial(), device_is_host=False, offloaded=False)
    assert host == {"loading": 1000, "training": 1500}
    assert estimate.memory(a_trial(), device_is_host=False, offloaded=True) == {"loading": 1000, "training": 900}
    assert estimate.disk(Config.from_flags(), a_trial(), 6) == {"7 checkpoints": 280, "the result": 5}
    kept = Config.from_flags(checkpoints_total_limit=2, stop_when="auto")
    assert estimate.disk(kept, a_trial(), 6) == {"4 checkpoints": 160, "the result": 5}


def test_dry_run_says_the_same_and_so_does_fit(world, capsys):
    assert cli.main(["train", *words(flags(world)), "--dry_run"]) == 0
    said = capsys.readouterr()
    assert "\nmemory: " in said.out
    assert "warning: AGC can hardly skip anything" in said.err
    assert "round 1" not in said.err
    fit = ["fit", str(world / "data"), "--base", str(world / "base"), "--output", str(world / "never"), "--dry_run"]
    assert cli.main([*fit, "--no_audit", "--validation_inference_steps", "2"]) == 0
    said = capsys.readouterr()
    assert said.out.index("settings chosen") < said.out.index("\ntime: ")
    assert not (world / "never").exists()


def test_of_several_ranks_the_first_one_plans_for_all(world, monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    from iet_finetune.cli.plan_command import show_plan

    show_plan(config_of(world))
    assert capsys.readouterr().out == ""
    assert NumRanks.launched() == NumRanks(2, 2)
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"smoke": True}, "`--smoke` tries a recipe"),
        ({"num_shards": 50}, "`--num_shards 50` needs at least 50 images"),
    ],
)
def test_what_cannot_be_planned_is_one_line(world, more, words):
    with pytest.raises(UserError, match=words):
        make_plan(config_of(world, **more))


def test_an_interrupted_plan_promises_no_checkpoint_and_leaves_nothing(world, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt("`--resume_from_checkpoint latest` goes on from checkpoint-6")

    monkeypatch.setattr(Trainer, "train", interrupt)
    assert cli.main(["plan", *words(flags(world))]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "iet-finetune: interrupted; the same command starts over."
    assert sorted(path.name for path in world.iterdir()) == ["base", "cache", "data"]


def test_a_trainer_takes_no_dry_run(world):
    with pytest.raises(UserError, match="`--dry_run` is for the commands"):
        Trainer(config_of(world, dry_run=True))
