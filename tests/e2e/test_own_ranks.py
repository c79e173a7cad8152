"""`iet-finetune train --num_processes N` starts the ranks itself, and its own line is the last one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.command import PROGRAM, flags, started, wait_for, words
from safetensors.torch import load_file
from tiny import save_images, save_tiny_sd

from iet_finetune import UserError, cli
from iet_finetune.cli.ranks import split_off

TRAIN = [sys.executable, "-m", "iet_finetune", "train"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 12)
    return folder


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    with started([*TRAIN, *arguments], launcher=True) as process:
        stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def test_two_ranks_leave_the_bits_of_one(world, tmp_path):
    outputs = [tmp_path / name for name in ("one", "two")]
    settings = [words(flags(world, output, learning_rate=1e-3)) for output in outputs]
    assert cli.main(["train", *settings[0]]) == 0
    done = run(*settings[1], "--num_processes", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("load it with: ")
    one, two = (load_file(output / "unet" / "diffusion_pytorch_model.safetensors") for output in outputs)
    assert all((one[name] == two[name]).all() for name in one)


def test_fit_chooses_once_for_all_ranks(world, tmp_path):
    fit = [sys.executable, "-m", "iet_finetune", "fit", str(world / "data"), "--base", str(world / "base")]
    settings = {"max_train_steps": 4, "merge_every_steps": 2, "audit": False, "num_validation_images": 1}
    settings |= {"validation_inference_steps": 1, "report_to": "none", "output_dir": tmp_path / "out"}
    with started([*fit, *words(settings), "--num_processes", "2"], launcher=True) as process:
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout.count("settings chosen for these images:") == 1
    assert stdout.count("steps: 4 (2 rounds)") == 1, stdout
    assert stdout.splitlines()[-1].startswith("to train again, also with other settings: iet-finetune train --config ")
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_interrupted_it_ends_with_the_line_that_names_the_checkpoint(world, tmp_path):
    settings = {"num_train_epochs": 500, "checkpointing_steps": 3, "checkpoints_total_limit": 1}
    command = [*TRAIN, "--num_processes=2", *words(flags(world, tmp_path / "out", **settings))]
    with started(command, launcher=True) as process:
        wait_for(lambda: any((tmp_path / "out").glob("checkpoint-*/manifest.json")), process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    last = said.splitlines()[-1]
    assert last.startswith(f"{PROGRAM}interrupted; `--resume_from_checkpoint latest` goes on from checkpoint-")
    assert "Traceback" not in said


def test_a_mistake_is_one_line_with_exit_code_2(world, tmp_path):
    done = run(*words(flags(world, tmp_path / "out", num_shards=50)), "--num_processes", "2")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{PROGRAM}error: `--num_shards 50` needs at least 50 images")


@pytest.mark.parametrize("given", ["0", "two", "-1", ""])
def test_a_number_that_is_none_is_refused(given):
    with pytest.raises(UserError, match="`--num_processes` must be a whole number of at least 1"):
        split_off(["--seed", "1", "--num_processes", given])


def test_it_is_taken_out_of_the_arguments_unless_a_launcher_has_started_the_ranks(monkeypatch):
    assert split_off(["--seed", "1"]) == (None, ["--seed", "1"])
    assert split_off(["--num_processes=3", "--seed", "1"]) == (3, ["--seed", "1"])
    monkeypatch.setenv("RANK", "0")
    assert split_off(["--num_processes=3"]) == (None, ["--num_processes=3"])
