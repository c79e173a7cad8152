"""Ctrl-C finishes the step under way and writes it down; a second one ends at once; nothing is promised too early."""

import os
import signal
import threading
from pathlib import Path

import pytest
from runs import AtStepEnd, assert_equal, files
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, save_tiny_sd

from iet_finetune import Callback, Config, Trainer, cli
from iet_finetune.training.interrupts import Interrupts, how_to_go_on

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
STEPS = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline of 10 timesteps and 10 images, and what a run of two shards and two rounds leaves."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 10)
    Trainer(config(folder, folder / "whole")).train()
    return folder


def config(world: Path, output: Path, **flags) -> Config:
    """Each clone takes four steps in a round."""
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"),
        "train_data_dir": str(world / "data"),
        "output_dir": str(output),
        "resolution": RESOLUTION,
        "train_batch_size": 3,
        "num_shards": 2,
        "num_train_epochs": 4,
        "merge_every_epochs": 2,
        "learning_rate": 1e-3,
        "agc_threshold": 0.9,
        "agc_decay": 0.1,
        "checkpointing_steps": 5,
        "report_to": "none",
    }
    return Config.from_flags(**{**defaults, **flags})


def presses(*steps: int) -> Callback:
    """Somebody presses Ctrl-C whenever so many steps are taken."""
    return AtStepEnd(lambda facts: facts.step in steps and os.kill(os.getpid(), signal.SIGINT))


@pytest.fixture(autouse=True)
def usual_handler():
    """As on a terminal, whatever runs the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_after_any_step_it_is_written_down_named_and_goes_on_to_the_same_bits(world, tmp_path, step):
    with pytest.raises(
        KeyboardInterrupt, match=rf"^`--resume_from_checkpoint latest` goes on from checkpoint-{step}$"
    ):
        Trainer(config(world, tmp_path / "out"), [presses(step)]).train()
    assert (tmp_path / "out" / f"checkpoint-{step}" / "manifest.json").is_file()
    Trainer(config(world, tmp_path / "out", resume_from_checkpoint="latest")).train()
    assert_equal(load_file(tmp_path / "out" / WEIGHTS), load_file(world / "whole" / WEIGHTS))
    for record in ("metrics.jsonl", "ledger.parquet"):
        assert (tmp_path / "out" / record).read_bytes() == (world / "whole" / record).read_bytes()


def test_the_second_one_does_not_wait_for_the_step(world, tmp_path):
    class Impatient(Callback):
        def on_step_end(self, facts) -> None:
            if facts.step == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"^there is no checkpoint yet: .* starts over$"):
        Trainer(config(world, tmp_path / "out"), [Impatient()]).train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    Trainer(config(world, tmp_path / "out", resume_from_checkpoint="latest")).train()
    assert_equal(load_file(tmp_path / "out" / WEIGHTS), load_file(world / "whole" / WEIGHTS))


def test_before_the_first_step_nothing_is_promised(world, tmp_path):
    class Early(Callback):
        def on_run_begin(self, facts) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="there is no checkpoint yet"):
        Trainer(config(world, tmp_path / "out"), [Early()]).train()


def test_while_the_run_is_prepared_nothing_is_promised_either(world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "iet_finetune.training.preparing.assemble", lambda *_, **__: signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt, match="there is no checkpoint yet"):
        Trainer(config(world, tmp_path / "out"))
    # The folder is free again.
    monkeypatch.undo()
    Trainer(config(world, tmp_path / "out", resume_from_checkpoint="latest"))


def test_the_command_ends_with_that_line_and_code_130(world, tmp_path, capsys, monkeypatch):
    real = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, given: real(self, given, [presses(7)]))
    words = [f"--{name}={value}" for name, value in changed(config(world, tmp_path / "out")).items()]
    assert cli.main(["train", *words]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "iet-finetune: interrupted; `--resume_from_checkpoint latest` goes on from checkpoint-7."


def test_while_the_program_starts_nothing_is_promised_that_is_not_there(world, tmp_path, capsys, monkeypatch):
    def interrupted(self, given):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "__init__", interrupted)
    words = [f"--{name}={value}" for name, value in changed(config(world, tmp_path / "out")).items()]
    assert cli.main(["train", *words]) == 130
    assert "interrupted; there is no checkpoint yet: " in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "out" / "checkpoint-12").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-12" / "manifest.json").touch()
    assert cli.main(["train", *words]) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("goes on from checkpoint-12.")


def changed(settings: Config) -> dict:
    """Flags that differ from their defaults and are no lists."""
    flags, usual = settings.to_flags(), Config.from_flags().to_flags()
    return {name: value for name, value in flags.items() if value != usual[name] and not isinstance(value, list)}


def test_somebody_elses_handler_is_left_alone(world, tmp_path):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        output = Trainer(config(world, tmp_path / "out"), [presses(2, 9)]).train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [1, 1]
    assert files(output) == files(world / "whole")


def test_outside_the_main_thread_no_handler_is_set(world, tmp_path):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(Trainer(config(world, tmp_path / "out")).train()))
    thread.start()
    thread.join()
    assert ended == [tmp_path / "out"]


def test_several_ranks_are_interrupted_as_ever():
    interrupts = Interrupts(is_alone=False)
    with interrupts.noted(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not interrupts.asked


def test_class_images_that_are_drawn_are_kept(tmp_path):
    (tmp_path / "drawn-000000.png").touch()
    (tmp_path / "own.png").touch()
    said = how_to_go_on(tmp_path / "out", tmp_path)
    assert said.endswith("starts over, and keeps the class images drawn so far (1)")
    assert how_to_go_on(tmp_path / "out", tmp_path / "none").endswith("starts over")


def test_where_there_is_no_folder_there_is_no_checkpoint(tmp_path):
    assert how_to_go_on(tmp_path / "missing").startswith("there is no checkpoint yet")
