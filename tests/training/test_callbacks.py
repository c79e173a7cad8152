"""Callbacks are passed what happens in a run, in order, and change nothing of it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from runs import AtStepEnd, assert_equal, files
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, save_tiny_sd

from iet_finetune import Callback, Config, Trainer, UserError

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


class Recorder(Callback):
    """Keeps the facts of each event with its name."""

    def __init__(self) -> None:
        self.events: list = []
        for name in ("on_run_begin", "on_step_end", "on_round_end", "on_checkpoint", "on_run_end"):
            setattr(self, name, lambda facts, name=name: self.events.append((name, facts)))

    def of(self, name: str) -> list:
        return [facts for event, facts in self.events if event == name]


class LossRecorder(Recorder):
    wants_losses = True


class Borrower(Callback):
    """Draws with the pipeline of each round, and keeps its weights."""

    def __init__(self) -> None:
        self.weights, self.images = [], []

    def on_round_end(self, facts) -> None:
        with facts.pipeline() as pipeline:
            self.weights.append({name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()})
            generator = torch.Generator().manual_seed(3)
            images = pipeline("a dog", num_inference_steps=2, generator=generator, output_type="np").images
            self.images += list(images)
            assert not torch.is_grad_enabled()
            assert not pipeline.unet.training


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline of 10 timesteps and 10 images."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 10)
    return folder


def config(world: Path, output: Path, **flags) -> Config:
    """Shards of 5 images: a clone takes two steps in a pass and four in a round, and there are two rounds."""
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"),
        "train_data_dir": str(world / "data"),
        "output_dir": str(output),
        "resolution": RESOLUTION,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_shards": 2,
        "num_train_epochs": 4,
        "merge_every_epochs": 2,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "agc_threshold": 0.99,
        "agc_decay": 0.1,
        "checkpointing_steps": 5,
        "logging_steps": 3,
        "report_to": "none",
    }
    return Config.from_flags(**{**defaults, **flags})


@pytest.fixture(scope="module")
def observed(world, tmp_path_factory) -> tuple[Path, Recorder, LossRecorder, Borrower]:
    """A run with three callbacks, one of which wants losses and one draws; a run without leaves the same."""
    folder = tmp_path_factory.mktemp("recorded")
    callbacks = Recorder(), LossRecorder(), Borrower()
    output = Trainer(config(world, folder / "out"), callbacks=callbacks).train()
    plain = Trainer(config(world, folder / "plain")).train()
    assert files(output) == files(plain)
    assert_equal(load_file(output / WEIGHTS), load_file(plain / WEIGHTS))
    assert (output / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
    return output, *callbacks


@pytest.fixture
def recorded(observed) -> tuple[Path, Recorder, LossRecorder]:
    return observed[:3]


def test_a_round_lends_the_pipeline_with_the_merged_weights(observed, world):
    output, _, _, borrower = observed
    first, last = borrower.weights
    assert_equal(last, load_file(output / WEIGHTS))
    assert any(not torch.equal(first[name], last[name]) for name in last)
    assert not np.array_equal(*borrower.images)
    averaged = Borrower()
    output = Trainer(config(world, output.parent / "ema", use_ema=True, ema_max_decay=0.5), [averaged]).train()
    assert_equal(averaged.weights[-1], load_file(output / WEIGHTS))


def test_every_event_comes_once_and_in_order_to_all_callbacks(recorded):
    output, recorder, other = recorded
    names = [name for name, _ in recorder.events]
    step, checkpoint = "on_step_end", "on_checkpoint"
    between = [*[step] * 4, step, checkpoint, *[step] * 3]
    last = [step, step, checkpoint, *[step] * 4, step, checkpoint, step]
    end = ["on_round_end", checkpoint]
    assert names == ["on_run_begin", *between, *end, *last, *end, "on_run_end"]
    assert [name for name, _ in other.events] == names
    assert [facts.step for facts in recorder.of(step)] == list(range(1, 17))
    assert [facts.step for facts in recorder.of(checkpoint)] == [5, 8, 10, 15, 16]
    assert [facts.folder for facts in recorder.of(checkpoint)] == [
        output / f"checkpoint-{facts.step}" for facts in recorder.of(checkpoint)
    ]


def test_the_facts_of_a_run_say_where_it_stands(recorded):
    output, recorder, _ = recorded
    (begin,), (end,) = recorder.of("on_run_begin"), recorder.of("on_run_end")
    assert (begin.output, begin.rank, begin.num_images, begin.num_shards) == (output, 0, 10, 2)
    assert (begin.step, begin.round, begin.total_steps, begin.total_rounds) == (0, 0, 16, 2)
    assert end == dataclasses.replace(begin, step=16, round=2)


def test_the_facts_of_a_step_say_which_clone_took_it_and_what_is_logged(recorded):
    _, recorder, _ = recorded
    steps = recorder.of("on_step_end")
    assert [(facts.round, facts.shard) for facts in steps] == [
        (round_, shard) for round_ in (1, 2) for shard in (0, 1) for _ in range(4)
    ]
    assert [facts.clone_step for facts in steps] == [*range(1, 5), *range(1, 5), *range(5, 9), *range(5, 9)]
    assert [facts.images for facts in steps] == [4, 1] * 8
    assert [facts.clone_step for facts in steps if facts.logged is not None] == [3, 4, 3, 4, 6, 8, 6, 8]
    assert [facts.logged.learning_rate for facts in steps[:4] if facts.logged] == [1e-3, 1e-3]
    with pytest.raises(dataclasses.FrozenInstanceError):
        steps[0].step = 0


def test_the_facts_of_a_round_are_its_line_of_metrics(recorded):
    output, recorder, _ = recorded
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [dict(facts.metrics) for facts in recorder.of("on_round_end")] == lines
    assert [(facts.round, facts.step) for facts in recorder.of("on_round_end")] == [(1, 8), (2, 16)]
    with pytest.raises(TypeError):
        recorder.of("on_round_end")[0].metrics["loss"] = 0.0


def test_losses_by_sample_add_up_to_what_is_logged_and_to_the_ledger(recorded):
    output, recorder, _ = recorded
    steps = recorder.of("on_step_end")
    assert all(len(facts.samples.loss) == facts.images for facts in steps)
    first = [facts.samples for facts in steps[:3]]
    assert steps[2].logged.loss == pytest.approx(np.mean(np.concatenate([facts.loss for facts in first])))
    skipped = np.concatenate([~facts.keep.numpy() for facts in first])
    assert steps[2].logged.skip_rate == pytest.approx(skipped.mean())
    ledger = pq.read_table(output / "ledger.parquet")
    seen, lost = np.zeros(10, int), np.zeros(10, int)
    for facts in steps:
        images = facts.samples.images.numpy()
        np.add.at(seen, images, 1)
        np.add.at(lost, images, ~facts.samples.keep.numpy())
        assert facts.samples.timesteps.max() < 10
    assert seen.tolist() == ledger["seen"].to_pylist()
    assert lost.tolist() == ledger["skipped"].to_pylist()
    assert lost.any()


def test_without_a_wish_for_losses_there_are_none(world, tmp_path):
    recorder = Recorder()
    Trainer(config(world, tmp_path / "out", num_train_epochs=2), callbacks=[recorder]).train()
    assert all(facts.samples is None for facts in recorder.of("on_step_end"))


def test_an_error_of_a_callback_ends_the_run_and_it_can_go_on(world, tmp_path, recorded):
    def stop(facts):
        if facts.step == 7:
            raise UserError("that is enough")

    recorder = Recorder()
    with pytest.raises(UserError, match="^that is enough$"):
        Trainer(config(world, tmp_path / "out"), callbacks=[AtStepEnd(stop), recorder]).train()
    assert [name for name, _ in recorder.events][-1] == "on_step_end"
    resumed = Recorder()
    settings = config(world, tmp_path / "out", resume_from_checkpoint="latest")
    output = Trainer(settings, callbacks=[resumed]).train()
    assert resumed.of("on_run_begin")[0].step == 5
    assert [facts.step for facts in resumed.of("on_step_end")] == list(range(6, 17))
    assert_equal(load_file(output / WEIGHTS), load_file(recorded[0] / WEIGHTS))
