"""An interrupted run that is resumed leaves the same behind as one that was not."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from runs import AtStepEnd, Killed, files, run_until, train_on_ranks
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, save_tiny_sd

from iet_finetune import Config, Trainer, UserError
from iet_finetune.ensemble.checkpoint import CheckpointStore
from iet_finetune.publish import outputs
from iet_finetune.training.callbacks import StepFacts


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline with dropout, 12 images, and `whole`: what a run leaves that was never interrupted."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", dropout=0.3, timesteps=10)
    save_images(folder / "data", 12)
    Trainer(config(folder, folder / "whole")).train()
    return folder


def config(world: Path, output: Path, **flags) -> Config:
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"),
        "train_data_dir": str(world / "data"),
        "output_dir": str(output),
        "resolution": RESOLUTION,
        "train_batch_size": 2,
        "num_shards": 3,
        "num_train_epochs": 5,
        "merge_every_epochs": 2,
        "lr_warmup_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "agc_threshold": 0.99,
        "agc_decay": 0.1,
        "use_ema": True,
        "random_flip": True,
        "checkpointing_steps": 3,
        "checkpoints_total_limit": 2,
        "logging_steps": 2,
        "validation_prompts": ["a"],
        "num_validation_images": 1,
        "validation_inference_steps": 1,
        "report_to": "none",
    }
    return Config.from_flags(**{**defaults, **flags})


GONE_AT_THE_FIRST_CHECKPOINT = """
    class Gone(Callback):
        def on_run_begin(self, facts):
            self.output = facts.output

        def on_step_end(self, facts):
            if facts.clone_step == 3:
                while not list(self.output.glob("checkpoint-*/manifest.json")):
                    time.sleep(0.01)
                os._exit(9)

    callbacks.append(Gone())
"""


def assert_same_outcome(ours: Path, theirs: Path) -> None:
    for name in ("unet/diffusion_pytorch_model.safetensors",):
        one, other = load_file(ours / name), load_file(theirs / name)
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert (ours / "metrics.jsonl").read_text() == (theirs / "metrics.jsonl").read_text()
    assert pq.read_table(ours / "ledger.parquet").equals(pq.read_table(theirs / "ledger.parquet"))
    assert files(ours) == files(theirs)


@pytest.mark.parametrize("stops", [(1,), (5,), (14, 2, 3), (13, 18), (8, 23), (30,)])
def test_a_run_stopped_anywhere_and_resumed_ends_in_the_same_bits(world, tmp_path, stops):
    output = tmp_path / "out"
    resume = {"resume_from_checkpoint": "latest"}
    for stop in stops:
        run_until(config(world, output, **resume), stop)
    Trainer(config(world, output, **resume)).train()
    assert_same_outcome(output, world / "whole")


def test_the_skip_decisions_of_the_whole_run_are_not_all_alike(world):
    lines = [json.loads(line) for line in (world / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < sum(line["skip_rate"] for line in lines) < len(lines)


def test_a_finished_run_resumed_changes_nothing_and_can_be_made_longer(world, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(world / "whole", output)
    Trainer(config(world, output, resume_from_checkpoint="latest")).train()
    assert_same_outcome(output, world / "whole")
    Trainer(config(world, output, resume_from_checkpoint="latest", num_train_epochs=6)).train()
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]
    assert json.loads(lines[-1])["step"] == 36


def test_steps_of_all_clones_instead_of_passes_are_the_same_run_and_resume_as_it_does(world, tmp_path):
    output = tmp_path / "out"
    same = {"resume_from_checkpoint": "latest", "total_train_steps": 30}
    run_until(config(world, output, **same), 14)
    Trainer(config(world, output, **same)).train()
    assert_same_outcome(output, world / "whole")
    Trainer(config(world, output, **{**same, "total_train_steps": 32})).train()
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 33
    with pytest.raises(UserError, match="`--total_train_steps` ask for fewer"):
        Trainer(config(world, output, **same))


def test_an_older_checkpoint_can_be_chosen_and_later_ones_give_way(world, tmp_path):
    output = tmp_path / "out"
    run_until(config(world, output, checkpoints_total_limit=None), 14)
    names = [path.name for path in sorted(output.glob("checkpoint-*"))]
    assert names == ["checkpoint-12", "checkpoint-3", "checkpoint-6", "checkpoint-9"]
    older = {"resume_from_checkpoint": str(output / "checkpoint-6"), "checkpoints_total_limit": None}
    run_until(config(world, output, **older), 4)
    assert [path.name for path in sorted(output.glob("checkpoint-*"))] == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-9",
    ]
    Trainer(config(world, output, resume_from_checkpoint="latest")).train()
    assert_same_outcome(output, world / "whole")


def test_no_more_checkpoints_are_kept_than_asked_for(world):
    assert [path.name for path in sorted((world / "whole").glob("checkpoint-*"))] == ["checkpoint-27", "checkpoint-30"]


def test_what_did_not_change_between_checkpoints_is_linked_and_not_written_again(world, tmp_path):
    output = tmp_path / "out"
    run_until(config(world, output), 10)
    one, other = output / "checkpoint-6", output / "checkpoint-9"
    same = [name for name in files(other) if (one / name).exists() and (one / name).samefile(other / name)]
    assert "denoiser.safetensors" in same
    assert "shard-00000/moments.pt" in same
    assert "shard-00001/live.safetensors" not in same


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_shards": 2}, "`--num_shards` has changed (3 then, 2 now)"),
        ({"seed": 1}, "the training data|`--seed`"),
        ({"shard_strategy": "stratified", "shard_by_column": "kind"}, "the training data|`--shard_strategy`"),
        ({"train_batch_size": 4}, "`--train_batch_size` times `--gradient_accumulation_steps`"),
        ({"merge_every_epochs": 1}, "`--merge_every_epochs`"),
        ({"agc_threshold": 0.5}, "`--agc_threshold`"),
        ({"agc_decay": 0.5}, "`--agc_decay`"),
        ({"use_ema": False}, "`--use_ema`"),
        ({"max_train_samples": 9}, "the training data"),
        ({"prediction_type": "v_prediction"}, "`--prediction_type`"),
    ],
)
def test_resuming_with_another_setting_is_refused_by_name(world, tmp_path, change, named):
    shutil.copytree(world / "whole", tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match="cannot resume") as error:
        Trainer(config(world, tmp_path / "out", resume_from_checkpoint="latest", **change))
    assert any(name in str(error.value) for name in named.split("|"))
    assert files(tmp_path / "out") == before


def test_resuming_with_changed_images_or_another_base_model_is_refused(world, tmp_path):
    for name in ("base", "data", "whole"):
        shutil.copytree(world / name, tmp_path / name)
    images = tmp_path / "data"
    shutil.copy(images / "000.png", images / "001.png")
    with pytest.raises(UserError, match="the training data has changed"):
        Trainer(config(tmp_path, tmp_path / "whole", resume_from_checkpoint="latest"))
    shutil.copy(world / "data" / "001.png", images / "001.png")
    save_tiny_sd(tmp_path / "base", dropout=0.3, timesteps=10, seed=1)
    with pytest.raises(UserError, match="the base model has changed"):
        Trainer(config(tmp_path, tmp_path / "whole", resume_from_checkpoint="latest"))


def test_a_learning_rate_may_change_with_a_warning(world, tmp_path, capsys):
    output = tmp_path / "out"
    run_until(config(world, output), 8)
    Trainer(config(world, output, resume_from_checkpoint="latest", learning_rate=1e-4))
    assert "learning_rate was 0.001, is 0.0001" in capsys.readouterr().err


def test_latest_without_a_checkpoint_starts_anew_and_a_missing_path_is_an_error(world, tmp_path):
    run_until(config(world, tmp_path / "out", resume_from_checkpoint="latest"), 1)
    with pytest.raises(UserError, match="checkpoint-7`: there is no complete checkpoint"):
        Trainer(config(world, tmp_path / "out", resume_from_checkpoint="checkpoint-7"))


def test_a_damaged_checkpoint_is_named(world, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(world / "whole", output)
    (output / "checkpoint-30" / "shard-00001" / "clone.pt").unlink()
    with pytest.raises(UserError, match="checkpoint-30 is damaged: shard-00001/clone.pt is missing"):
        Trainer(config(world, output, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    ("broken", "place", "saved"),
    [
        (1, "round 1, shard 1 of 3, step 2", ["checkpoint-0"]),
        (13, "round 2, shard 1 of 3, step 6", ["checkpoint-12"]),
        (15, "round 2, shard 1 of 3, step 8", ["checkpoint-12", "checkpoint-15"]),
        (16, "round 2, shard 2 of 3, step 5", ["checkpoint-15", "checkpoint-16"]),
    ],
)
def test_a_run_that_breaks_leaves_good_weights_and_can_go_on(world, tmp_path, broken, place, saved):
    output = tmp_path / "out"

    def poison(facts: StepFacts) -> None:
        if facts.step == broken:
            trainer.model.family.objective.alphas_cumprod.fill_(float("nan"))

    trainer = Trainer(config(world, output), callbacks=[AtStepEnd(poison)])
    with pytest.raises(UserError, match=f"not finite in {place}") as error:
        trainer.train()
    assert f"saved in {output / saved[-1]}" in str(error.value)
    assert ("if that breaks too" in str(error.value)) == (len(CheckpointStore(output).all()) > 1)
    assert set(saved) <= {path.name for path in CheckpointStore(output).all()}
    Trainer(config(world, output, resume_from_checkpoint="latest")).train()
    if broken in (1, 13, 15):
        assert_same_outcome(output, world / "whole")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [12, 24, 30]


# 4, 3 and 3 images in batches of 3: the first clone takes 6 steps, the others 3, in rounds of 3.
UNEQUAL = {
    "max_train_samples": 10,
    "train_batch_size": 3,
    "num_train_epochs": 3,
    "merge_every_epochs": None,
    "merge_every_steps": 3,
    "checkpointing_steps": 1,
}


@pytest.fixture(scope="module")
def unequal(world) -> Path:
    """What a run with clones of unequal shards leaves that was never interrupted."""
    output = world / "unequal"
    Trainer(config(world, output, **UNEQUAL)).train()
    return output


def test_clones_of_unequal_shards_that_have_nothing_left_to_do_take_no_part_in_the_merge(unequal):
    lines = [json.loads(line) for line in (unequal / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [9, 12]
    assert lines[1]["clone_drift"][1:] == [0.0, 0.0]
    assert lines[1]["merge_drift"] == pytest.approx(lines[1]["clone_drift"][0], rel=1e-4)


@pytest.mark.parametrize("stop", [3, 9, 11, 12, 14, 15])
def test_clones_of_unequal_shards_resume_exactly_too(world, unequal, tmp_path, stop):
    output = tmp_path / "out"
    if stop < 12:
        run_until(config(world, output, **UNEQUAL), stop)
    else:
        trainer = Trainer(config(world, output, **UNEQUAL))
        collect, calls = trainer.ensemble.collect, []

        def collect_or_die(clone):
            calls.append(clone)
            if len(calls) == 6 - (15 - stop) // 2:
                raise Killed
            collect(clone)

        trainer.ensemble.collect = collect_or_die
        with pytest.raises(Killed):
            trainer.train()
    Trainer(config(world, output, resume_from_checkpoint="latest", **UNEQUAL)).train()
    assert_same_outcome(output, unequal)


def test_clones_that_trained_side_by_side_go_on_one_after_the_other_though_few_checkpoints_are_kept(world, tmp_path):
    output = tmp_path / "out"
    train_on_ranks(2, config(world, output), GONE_AT_THE_FIRST_CHECKPOINT)
    (found,) = CheckpointStore(output).all()
    assert len(list(found.glob("shard-*/live.safetensors"))) == 2
    one = {"resume_from_checkpoint": "latest", "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    run_until(config(world, output, **one), 2)
    Trainer(config(world, output, **one)).train()
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-30"]
    shutil.copytree(world / "whole" / "checkpoint-27", output / "checkpoint-27")
    assert_same_outcome(output, world / "whole")


def test_groups_go_on_in_the_midst_of_a_round_of_which_some_of_them_have_nothing_left_to_train(world, tmp_path):
    save_tiny_sd(tmp_path / "base", timesteps=10)
    shutil.copytree(world / "data", tmp_path / "data")
    settings = {"num_shards": 2, "num_train_epochs": 3, "adam_epsilon": 1e-4, "learning_rate": 2e-4}
    settings |= {"validation_prompts": [], "resume_from_checkpoint": "latest"}
    Trainer(config(tmp_path, tmp_path / "one", **settings)).train()
    # A round of a clone is 6 steps: the first shard is done, and the second begun.
    output = tmp_path / "out"
    run_until(config(tmp_path, output, **settings), 10)
    ended = train_on_ranks(4, config(tmp_path, output, **settings))
    assert [rank.code for rank in ended] == [0] * 4, ended
    one, other = (load_file(path / "unet/diffusion_pytorch_model.safetensors") for path in (tmp_path / "one", output))
    assert max((one[name] - other[name]).abs().max().item() for name in one) <= 1e-5
    ledgers = [pq.read_table(path / "ledger.parquet")["skipped"] for path in (tmp_path / "one", output)]
    assert ledgers[0] == ledgers[1]


def test_moments_that_were_not_averaged_cannot_be_taken_up_as_an_average(world, tmp_path):
    output = tmp_path / "out"
    run_until(config(world, output), 4)
    average = {"resume_from_checkpoint": "latest", "optimizer_across_rounds": "average"}
    with pytest.raises(UserError, match="`--optimizer_across_rounds average`: it was written with `keep` or `reset`"):
        Trainer(config(world, output, **average))
    Trainer(config(world, output, resume_from_checkpoint="latest")).train()
    assert_same_outcome(output, world / "whole")


def test_moments_that_rest_are_dropped_where_they_are_no_longer_kept(world, tmp_path):
    output = tmp_path / "out"
    run_until(config(world, output), 16)
    reset = config(world, output, resume_from_checkpoint="latest", optimizer_across_rounds="reset")
    moments = [clone.optimizer_state for clone in Trainer(reset).ensemble.clones]
    assert [bool(state) for state in moments] == [True, False, False]


@pytest.mark.parametrize("moments", ["keep", "reset", "average"])
def test_the_room_on_the_disk_that_is_asked_for_is_what_a_checkpoint_takes(world, tmp_path, monkeypatch, moments):
    asked = []
    monkeypatch.setattr(outputs, "check_space", lambda folder, needed: asked.append(needed))
    trainer = run_until(config(world, tmp_path / "out", optimizer_across_rounds=moments, outer_momentum=0.9), 19)
    models = [part for part in trainer.model.family.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    pipeline = sum(parameter.nbytes for model in models for parameter in model.parameters())
    # In the midst of the second round: one clone is done, one is live.
    checkpoint = tmp_path / "out" / "checkpoint-18"
    taken = sum((checkpoint / name).stat().st_size for name in files(checkpoint))
    assert taken == pytest.approx(asked[0] - pipeline, rel=0.1)


def test_a_shorter_run_than_the_one_that_was_is_refused(world, tmp_path):
    shutil.copytree(world / "whole", tmp_path / "out")
    with pytest.raises(UserError, match="10 steps of a clone into the run"):
        Trainer(config(world, tmp_path / "out", resume_from_checkpoint="latest", num_train_epochs=3))


def test_a_resume_that_is_refused_leaves_the_later_checkpoints_in_sight(world, tmp_path):
    shutil.copytree(world / "whole", tmp_path / "out")
    before = files(tmp_path / "out")
    bad = {"resume_from_checkpoint": "checkpoint-27", "report_to": "tensorboard", "logging_dir": "metrics.jsonl"}
    with pytest.raises(UserError, match="`--logging_dir`"):
        Trainer(config(world, tmp_path / "out", **bad))
    assert files(tmp_path / "out") == before


def test_pictures_of_a_run_that_never_reached_a_checkpoint_are_drawn_anew(world, tmp_path):
    output = tmp_path / "out"
    run_until(config(world, output), 1)
    before = (output / "validation" / "round-0000.png").read_bytes()
    run_until(config(world, output, resume_from_checkpoint="latest", validation_prompts=["b"]), 1)
    assert (output / "validation" / "round-0000.png").read_bytes() != before


def test_pictures_drawn_in_another_way_are_not_kept_on_resuming(world, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(world / "whole", output)
    Trainer(config(world, output, resume_from_checkpoint="latest", num_validation_images=2)).train()
    assert sorted(path.name for path in (output / "validation").iterdir()) == [
        "before_after.png",
        "round-0000.png",
        "round-0003.png",
    ]
