"""A run that is killed again and again, and resumed each time, leaves what a run without a stop leaves."""

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from e2e.command import SCRIPT, contents, environment, flags, leftovers, words

from iet_finetune import cli

pytestmark = pytest.mark.timeout(600)

# A round is 12 steps, of which a checkpoint is written after every fifth and the last.
RUN: dict[str, Any] = {
    "num_train_epochs": 20,
    "merge_every_epochs": 2,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "agc_threshold": 0.99,
    "agc_decay": 0.1,
    "use_ema": True,
    "random_flip": True,
    "logging_steps": 2,
    "checkpointing_steps": 5,
    "checkpoints_total_limit": 2,
    "validation_prompts": ["a thing"],
    "num_validation_images": 1,
    "validation_inference_steps": 1,
    "report_to": "tensorboard",
    "resume_from_checkpoint": "latest",
}
STEPS = 120
SEED = 20240722
KILLS = 5


@dataclass(frozen=True)
class Stop:
    """How one process ended: its exit code, what it said, and where its newest checkpoint stands."""

    code: int
    stdout: str
    stderr: str
    step: int
    position: dict[str, Any]


def newest(output: Path) -> tuple[int, dict[str, Any]]:
    """The number of the newest complete checkpoint, and its position; 0 and nothing if there is none."""
    manifests = {int(path.parent.name.split("-")[1]): path for path in output.glob("checkpoint-*/manifest.json")}
    if not manifests:
        return 0, {}
    step = max(manifests)
    return step, json.loads(manifests[step].read_text())["position"]


def stop_training(world: Path, output: Path, kill: Callable[[subprocess.Popen], None], delay: float, **more) -> Stop:
    """Starts or resumes the run, and kills it `delay` seconds after it has written its next checkpoint."""
    before = newest(output)[0]
    command = [*SCRIPT, *words(flags(world, output, **RUN, **more))]
    with subprocess.Popen(
        command, env=environment(), stdout=-1, stderr=-1, text=True, start_new_session=True
    ) as process:
        # The folder appears complete; one of those before may be removed while it is looked at.
        while not any(int(path.name.split("-")[1]) > before for path in output.glob("checkpoint-*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        time.sleep(delay)
        kill(process)
        stdout, stderr = process.communicate(timeout=60)
    return Stop(process.returncode, stdout, stderr, *newest(output))


@dataclass(frozen=True)
class Story:
    """The folders of a run without and of one with stops, and the stops."""

    whole: Path
    output: Path
    stops: list[Stop]


@pytest.fixture(scope="module")
def story(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Five kills at random moments, Ctrl-C on a run with workers, a polite request to end, and then the rest."""
    folder = tmp_path_factory.mktemp("kill")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert cli.main(["train", *words(flags(world, folder / "whole", **RUN))]) == 0
    seconds = [json.loads(line)["seconds"] for line in (folder / "whole" / "timings.jsonl").read_text().splitlines()]
    chance, longest = random.Random(SEED), sorted(seconds)[len(seconds) // 2] * 0.7
    print(f"moments drawn from seed {SEED}, up to {longest:.2f} seconds after a checkpoint")
    output = folder / "out"
    stops = [stop_training(world, output, lambda p: p.kill(), chance.uniform(0, longest)) for _ in range(KILLS)]
    # A terminal sends Ctrl-C to the workers, too.
    interrupt = stop_training(
        world, output, lambda p: _signal_group(p, signal.SIGINT), chance.uniform(0, longest), dataloader_num_workers=2
    )
    terminate = stop_training(world, output, lambda p: p.terminate(), chance.uniform(0, longest))
    command = [*SCRIPT, *words(flags(world, output, **RUN))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    end = Stop(done.returncode, done.stdout, done.stderr, *newest(output))
    return Story(folder / "whole", output, [*stops, interrupt, terminate, end])


def _signal_group(process: subprocess.Popen, number: int) -> None:
    import os

    os.killpg(process.pid, number)


def test_the_kills_hit_training_and_the_middle_of_rounds(story):
    kills = story.stops[:KILLS]
    assert [stop.code for stop in kills] == [-signal.SIGKILL] * KILLS
    steps = [stop.step for stop in story.stops]
    assert steps == sorted(steps)
    assert 0 < steps[0] < steps[KILLS + 1] < STEPS == steps[-1]
    # What is resumed there is a clone amid its steps, or a round with some shards finished.
    amid = [stop for stop in kills if stop.position["live"] is not None or stop.position["finished"]]
    assert len(amid) >= 2, [stop.position for stop in kills]


def test_a_run_killed_five_times_ends_in_the_same_files_bit_for_bit(story):
    assert story.stops[-1].code == 0, story.stops[-1].stderr
    ours, theirs = ({name: data for name, data in contents(f).items()} for f in (story.output, story.whole))
    for files in (ours, theirs):
        for name in [name for name in files if name.startswith("logs/") or name == "timings.jsonl"]:
            del files[name]
    assert sorted(ours) == sorted(theirs)
    ours["training_config.yaml"] = ours["training_config.yaml"].replace(
        str(story.output).encode(), str(story.whole).encode()
    )
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert "metrics.jsonl" in ours
    assert "checkpoint-120/ema.safetensors" in ours
    assert "validation/round-0010.png" in ours


def test_the_run_that_was_killed_was_one_in_which_agc_skips(story):
    lines = [json.loads(line) for line in (story.output / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    assert all(0 < line["skip_rate"] < 1 for line in lines[1:])


def test_nothing_half_written_is_left_and_no_line_of_timings_is_lost(story):
    assert leftovers(story.output) == []
    rounds = [json.loads(line)["round"] for line in (story.output / "timings.jsonl").read_text().splitlines()]
    assert rounds == list(range(1, 11))


@pytest.mark.parametrize("which", [KILLS, KILLS + 1], ids=["ctrl-c with workers", "terminate"])
def test_an_interrupt_ends_in_one_line_that_says_how_to_go_on(story, which):
    stop = story.stops[which]
    assert stop.code == 130
    assert stop.stdout == ""
    said = [line for line in stop.stderr.splitlines() if not line.startswith(("round ", "[transformers] ", "warning"))]
    assert said == [
        "iet-finetune: interrupted; `--resume_from_checkpoint latest` goes on from the last checkpoint."
    ]


@pytest.mark.parametrize("component", ["unet", "vae"])
@pytest.mark.parametrize("moved", [True, False], ids=["before", "after"])
def test_a_kill_while_the_pipeline_is_moved_into_place_is_mended(story, world, tmp_path, component, moved):
    # The old folder is aside; the new one is still in the partial pipeline, or in place already.
    output = Path(shutil.copytree(story.whole, tmp_path / "out"))
    (output / "model_index.json").unlink()
    shutil.copytree(output / component, output / f".{component}.replaced")
    (output / ".pipeline.partial").mkdir()
    if moved:
        shutil.move(output / component, output / ".pipeline.partial" / component)
    assert cli.main(["train", *words(flags(world, output, **RUN))]) == 0
    assert leftovers(output) == []
    ours, theirs = contents(output), contents(story.whole)
    names = [name for name in theirs if not name.startswith("logs/") and name != "training_config.yaml"]
    assert [name for name in names if ours.get(name) != theirs[name]] == []
