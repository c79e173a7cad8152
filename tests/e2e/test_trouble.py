"""What goes wrong while training: bad pixels, numbers that are not finite, a full disk; one line, and nothing lost."""

import io
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from diffusers import DiffusionPipeline
from e2e.command import (
    ERROR,
    HARMLESS,
    SCRIPT,
    contents,
    environment,
    flags,
    leftovers,
    run_script,
    the_error,
    wait_for,
    words,
)
from safetensors.torch import load_file
from tiny import RESOLUTION

from iet_finetune import cli
from iet_finetune.data import dataset
from iet_finetune.data.images import Looked
from iet_finetune.publish import result
from iet_finetune.training import finish

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LATEST = {"resume_from_checkpoint": "latest"}
MB = 1_000_000


def train(settings: dict) -> int:
    """The command in this process."""
    return cli.main(["train", *words(settings)])


def assert_finished(output: Path) -> None:
    """The output folder holds a complete pipeline that draws, and no remains of what went wrong."""
    assert not leftovers(output)
    pipeline = DiffusionPipeline.from_pretrained(output)
    assert pipeline("a thing", num_inference_steps=1, output_type="np").images[0].std() > 0


def assert_same_weights(ours: Path, theirs: Path) -> None:
    one, other = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_cut_off_is_named_when_training_reaches_it(world, tmp_path, capfd, monkeypatch, workers):
    # Or it would be found before training.
    monkeypatch.setattr(dataset, "look_at", lambda *_: Looked(RESOLUTION, RESOLUTION, False))
    data = Path(shutil.copytree(world / "data", tmp_path / "data"))
    whole = (data / "007.png").read_bytes()
    (data / "007.png").write_bytes(whole[: whole.index(b"IDAT") + 30])
    changes = {"train_data_dir": data, "dataloader_num_workers": workers, "cache_latents": False}
    settings = flags(world, tmp_path / "out", **changes)
    line = the_error(train(settings), *capfd.readouterr())
    assert line.startswith(f"`{data / '007.png'}` cannot be decoded: ")
    assert line.endswith("Replace or remove it.")
    (data / "007.png").write_bytes(whole)
    assert train({**settings, **LATEST}) == 0
    assert_finished(tmp_path / "out")


def test_a_loss_that_is_not_finite_says_where_and_the_run_goes_on_with_other_settings(world, tmp_path, capfd):
    output = tmp_path / "out"
    done = run_script(*words(flags(world, output, noise_offset=1e30)))
    line = the_error(done.returncode, done.stdout, done.stderr)
    assert "not finite in round 1, shard 1 of 3, step 1." in line
    assert f"saved in {output / 'checkpoint-0'}: lower `--learning_rate` or use `--mixed_precision no`" in line
    assert line.endswith("go on with `--resume_from_checkpoint latest`.")
    saved = load_file(output / "checkpoint-0" / "denoiser.safetensors")
    before = load_file(world / "base" / WEIGHTS)
    assert all(torch.equal(saved[name], before[name]) for name in before), "broken steps change no weight"
    assert not leftovers(output)

    assert train(flags(world, output, **LATEST)) == 0
    assert "noise_offset was 1e+30, is 0.0" in capfd.readouterr().err
    assert json.loads((output / "metrics.jsonl").read_text())["step"] == 6
    assert_finished(output)


def test_a_learning_rate_that_is_far_too_high_costs_nothing_that_was_saved(world, tmp_path, capfd):
    output = Path(shutil.copytree(world / "trained", tmp_path / "out"))
    before = {path: data for path, data in contents(output).items() if path.startswith("checkpoint-6/")}
    longer = flags(world, output, num_train_epochs=2, **LATEST)
    assert train({**longer, "learning_rate": 1e30}) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "not finite in round 2, shard 1 of 3, step 4" in line
    assert f"saved in {output / 'checkpoint-6'}: " in line
    assert before.items() <= contents(output).items()
    assert train(longer) == 0
    assert train(flags(world, tmp_path / "whole", num_train_epochs=2)) == 0
    assert_same_weights(output, tmp_path / "whole")
    assert_finished(output)


def test_a_disk_that_is_too_small_is_refused_before_training(world, small_disk, capfd):
    disk = small_disk(2 * MB)
    line = the_error(train(flags(world, disk / "out")), *capfd.readouterr())
    assert f"no space left on the device for `--output_dir {disk / 'out'}`" in line
    assert line.endswith("Choose a folder on another disk.")
    assert contents(disk) == {}


def fill(filler: Path) -> None:
    """Makes a file grow until the disk is full."""
    with filler.open("ab", buffering=0) as stream:
        for size in (100_000, 1000, 1):
            try:
                while stream.write(b"x" * size) == size:
                    pass
            except OSError:
                continue


def test_a_disk_that_fills_up_while_training_costs_nothing_that_was_saved(world, small_disk, tmp_path, capfd):
    disk = small_disk(40 * MB)
    longer = {"num_train_epochs": 5, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    settings = flags(world, disk / "out", **longer, **LATEST)
    command = [*SCRIPT, *words(settings)]
    with processes.Popen(command, env=environment(), text=True, stdout=-1, stderr=-1) as process:
        wait_for(lambda: list(disk.glob("out/checkpoint-*/manifest.json")), process)
        while process.poll() is None:
            fill(disk / "filler")
            time.sleep(0.01)
        stdout, stderr = process.communicate()
    lines = [line for line in stderr.splitlines() if not line.startswith(("round ", "[transformers] "))]
    line = the_error(process.returncode, stdout, "\n".join(lines))
    assert line.startswith("no space left on the device")
    assert f"while writing {disk / 'out'}/checkpoint-" in line
    assert "free some space" in line
    assert not leftovers(disk)
    assert list(disk.glob("out/checkpoint-*/manifest.json"))

    (disk / "filler").unlink()
    assert train(settings) == 0
    assert train(flags(world, tmp_path / "whole", num_train_epochs=5)) == 0
    assert_same_weights(disk / "out", tmp_path / "whole")
    assert_finished(disk / "out")


def test_ctrl_c_in_the_middle_of_a_file_of_a_checkpoint_is_still_ctrl_c(world, tmp_path, monkeypatch, capfd):
    class Interrupted(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 1000:
                signal.raise_signal(signal.SIGINT)
            return super().write(data)

    real = Path.open

    def opened(path: Path, *arguments: Any, **named: Any) -> Any:
        chosen = path.name == "moments.pt" and arguments == ("wb",)
        return Interrupted(path, "wb") if chosen else real(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", opened)
    settings = flags(world, tmp_path / "out", checkpointing_steps=2, **LATEST)
    assert train(settings) == 130
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(("round ", *HARMLESS))]
    # The first Ctrl-C waits for the checkpoint, the next one, a little later in the same file, does not.
    anew = "there is no checkpoint yet: the same command with `--resume_from_checkpoint latest` starts over"
    assert said == [f"iet-finetune: interrupted; {anew}."]
    monkeypatch.undo()
    assert train(settings) == 0
    assert_same_weights(tmp_path / "out", world / "trained")
    assert_finished(tmp_path / "out")


@pytest.mark.parametrize(
    ("room", "function"), [(result, "save_pipeline"), (finish, "write_ledger"), (finish, "write_model_card")]
)
def test_a_disk_that_is_full_at_the_end_costs_only_the_end(world, small_disk, monkeypatch, capfd, room, function):
    disk = small_disk(40 * MB)
    settings = flags(world, disk / "out", **LATEST)
    real = getattr(room, function)

    def late(*arguments: object) -> None:
        fill(disk / "filler")
        real(*arguments)

    monkeypatch.setattr(room, function, late)
    assert train(settings) == 2
    error = capfd.readouterr().err
    assert error.splitlines()[-1].startswith(f"{ERROR}no space left on the device")
    assert "Traceback" not in error
    assert not leftovers(disk)
    monkeypatch.undo()
    (disk / "filler").unlink()
    assert train(settings) == 0
    assert_same_weights(disk / "out", world / "trained")
    assert_finished(disk / "out")
