"""Runs of LoRA adapters that are stopped and resumed, or changed in what may not matter, leave the same bits."""

from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from e2e.command import assert_same, repeatable
from lora_runs import LATEST, LORA, UNET, config, metrics, train
from runs import AtStepEnd, Killed, files, run_until
from tiny import save_images, save_tiny_sd

from iet_finetune import Trainer, UserError
from iet_finetune.publish import outputs
from iet_finetune.training.callbacks import StepFacts

# Stops by the steps taken since the process began. They go on amid a clone, between two, after a merge, and then again
# amid a clone and between two that train on what a merge has left.
STOPS = (3, 3, 9, 3, 3)
RUNS = {
    "exact": {"lora_dropout": 0.1, "use_ema": True, "lora_export": "full_rank"},
    "exact, moments averaged": {"optimizer_across_rounds": "average"},
    "exact, moments reset": {"optimizer_across_rounds": "reset", "use_ema": True},
    "average": {"lora_merge": "average", "lora_dropout": 0.1, "use_ema": True, "outer_lr": 0.7, "outer_momentum": 0.9},
    "freeze_a": {"lora_merge": "freeze_a", "optimizer_across_rounds": "average"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline of 10 timesteps, 12 images, and what each of `RUNS` leaves that is never interrupted."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 12)
    for name in RUNS:
        train(folder, folder / name, **of(name))
    return folder


def of(name: str) -> dict[str, Any]:
    """The flags of one of `RUNS`."""
    return {**RUNS[name], "lr_scheduler": "cosine", "random_flip": True, **LATEST}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_anywhere_and_resumed_leaves_the_same_files(world, tmp_path, name):
    output, places = tmp_path / "out", []
    for stop in STOPS:
        AcceleratorState._reset_state(reset_partial_state=True)
        run_until(config(world, output, **of(name)), stop)
        places.append(max(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")))
    assert places == [2, 4, 12, 14, 16]
    assert_same(repeatable(train(world, output, **of(name))), repeatable(world / name))


def test_the_runs_are_such_that_agc_skips_and_exact_merges_leave_remainders(world):
    for name in RUNS:
        rates = [line["skip_rate"] for line in metrics(world / name)]
        assert len(rates) == 3
        assert 0 < sum(rates) < 3
    assert all(line["remainder_share"] > 0 for line in metrics(world / "exact"))
    last = world / "exact" / "checkpoint-30"
    assert {"denoiser_remainders.safetensors", "ema_away.safetensors"} <= {path.name for path in last.iterdir()}


def test_a_run_that_breaks_is_set_back_and_goes_on_to_the_same_files(world, tmp_path):
    def poison(facts: StepFacts) -> None:
        if facts.step == 13:
            trainer.model.family.objective.alphas_cumprod.fill_(float("nan"))

    trainer = Trainer(config(world, tmp_path / "out", **of("exact")), callbacks=[AtStepEnd(poison)])
    with pytest.raises(UserError, match="not finite in round 2, shard 1 of 3, step 6"):
        trainer.train()
    assert_same(repeatable(train(world, tmp_path / "out", **of("exact"))), repeatable(world / "exact"))


def test_an_offload_folder_and_pictures_between_rounds_change_no_bit(world, tmp_path):
    more = {"offload_dir": str(tmp_path / "offload"), "validation_prompts": ["a"]}
    more |= {"num_validation_images": 1, "validation_inference_steps": 1}
    output = train(world, tmp_path / "out", **of("exact"), **more)
    assert len(list((output / "validation").glob("round-*"))) == 4
    for name in (LORA, "metrics.jsonl", "ledger.parquet"):
        assert (output / name).read_bytes() == (world / "exact" / name).read_bytes(), name


def test_a_longer_run_leaves_nothing_of_what_the_shorter_one_saved_in_another_form(world, tmp_path):
    forms = ["full_rank", "fuse", None]
    for epochs, form in enumerate(forms, start=1):
        flags = {"num_train_epochs": epochs, "merge_every_epochs": 1, "lora_export": form, **LATEST}
        output = train(world, tmp_path / "out", **flags)
        fresh = train(world, tmp_path / f"fresh-{epochs}", **flags)
        assert files(output) == files(fresh), form
        assert (output / "README.md").read_bytes() == (fresh / "README.md").read_bytes()
        result = UNET if (output / "model_index.json").exists() else LORA
        assert (output / result).read_bytes() == (fresh / result).read_bytes()
    assert result == LORA, "without a form a LoRA file is saved"


def test_a_kill_while_a_pipeline_gives_way_to_a_lora_file_is_mended(world, tmp_path, monkeypatch):
    short = {"num_train_epochs": 1, "merge_every_epochs": 1, **LATEST}
    output, fresh = tmp_path / "out", train(world, tmp_path / "fresh", **short)
    train(world, output, lora_export="fuse", **short)
    real, removed = outputs.remove_folder, []

    def remove_or_die(folder: Path) -> None:
        if removed:
            raise Killed
        real(folder)
        removed.append(folder)

    monkeypatch.setattr(outputs, "remove_folder", remove_or_die)
    with pytest.raises(Killed):
        train(world, output, **short)
    monkeypatch.undo()
    assert files(train(world, output, **short)) == files(fresh)
    assert (output / LORA).read_bytes() == (fresh / LORA).read_bytes()
