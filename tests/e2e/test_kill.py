"""A run that is killed again and again, and resumed each time, leaves what a run without a stop leaves."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from accelerate.state import AcceleratorState
from e2e.command import HARMLESS, SCRIPT, assert_same, environment, flags, leftovers, repeatable, words

from iet_finetune import cli
from iet_finetune.ensemble.checkpoint import CheckpointStore
from iet_finetune.ensemble.pieces import tensors_piece
from iet_finetune.files import clean

pytestmark = pytest.mark.timeout(600)

# A round is 12 steps, of which a checkpoint is written after every fifth and the last.
RUN: dict[str, Any] = {
    "num_train_epochs": 30,
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
# Adapters instead: three rounds and one that is shorter.
LORA: dict[str, Any] = {**RUN, "use_lora": True, "rank": 2, "lora_dropout": 0.1, "num_train_epochs": 7}
STEPS = 180
ROUNDS = 15
SEED = 20240722
KILLS = 5


@dataclass(frozen=True)
class Stop:
    """How one process ended: its exit code, what it said, and where its newest checkpoint stands.

    `amid` is whether that is in the middle of a round.
    """

    code: int
    stdout: str
    stderr: str
    step: int
    amid: bool


def newest(output: Path) -> tuple[int, bool]:
    """The number of the newest complete checkpoint, and whether it is amid a round; 0 if there is none."""
    manifests = {int(path.parent.name.split("-")[1]): path for path in output.glob("checkpoint-*/manifest.json")}
    if not manifests:
        return 0, False
    step = max(manifests)
    manifest = json.loads(manifests[step].read_text())
    live = any(name.endswith("/live.safetensors") for name in manifest["pieces"])
    return step, live or manifest["position"]["finished"] > 0


def stop_training(world: Path, output: Path, kill: Callable[[subprocess.Popen], None], delay: float, **more) -> Stop:
    """Starts or resumes the run, and kills it `delay` seconds after it has written its next checkpoint."""
    before = newest(output)[0]
    command = [*SCRIPT, *words(flags(world, output, **RUN | more))]
    with processes.Popen(
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
    chance, longest = random.Random(SEED), sorted(seconds)[len(seconds) // 2]
    print(f"moments drawn from seed {SEED}, up to {longest:.2f} seconds after a checkpoint")
    output = folder / "out"
    stops = [stop_training(world, output, lambda p: p.kill(), chance.uniform(0, longest)) for _ in range(KILLS)]
    # A terminal sends Ctrl-C to the workers, too.
    interrupt = stop_training(
        world, output, lambda p: os.killpg(p.pid, signal.SIGINT), chance.uniform(0, longest), dataloader_num_workers=2
    )
    terminate = stop_training(world, output, lambda p: p.terminate(), chance.uniform(0, longest))
    command = [*SCRIPT, *words(flags(world, output, **RUN))]
    done = processes.run(command, env=environment())
    end = Stop(done.returncode, done.stdout, done.stderr, *newest(output))
    return Story(folder / "whole", output, [*stops, interrupt, terminate, end])


def test_the_kills_hit_training_and_the_middle_of_rounds(story):
    kills = story.stops[:KILLS]
    assert [stop.code for stop in kills] == [-signal.SIGKILL] * KILLS
    steps = [stop.step for stop in story.stops]
    assert steps == sorted(steps)
    assert 0 < steps[0] < steps[KILLS + 1] < STEPS == steps[-1]
    # What is resumed there is a clone amid its steps, or a round with some shards finished.
    assert sum(stop.amid for stop in kills) >= 2, kills


def test_a_run_killed_five_times_ends_in_the_same_files_bit_for_bit(story):
    assert story.stops[-1].code == 0, story.stops[-1].stderr
    ours = repeatable(story.output)
    assert_same(ours, repeatable(story.whole))
    assert {"metrics.jsonl", "ledger.parquet", "README.md", f"validation/round-{ROUNDS:04d}.png"} < ours.keys()
    assert {"unet/diffusion_pytorch_model.safetensors", f"checkpoint-{STEPS}/ema.safetensors"} < ours.keys()


def test_the_run_that_was_killed_was_one_in_which_agc_skips(story):
    lines = [json.loads(line) for line in (story.output / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == ROUNDS
    assert all(0 < line["skip_rate"] < 1 for line in lines[1:])


def test_nothing_half_written_is_left_and_no_line_of_timings_is_lost(story):
    assert leftovers(story.output) == []
    rounds = [json.loads(line)["round"] for line in (story.output / "timings.jsonl").read_text().splitlines()]
    assert rounds == list(range(1, ROUNDS + 1))


@pytest.mark.parametrize("which", [KILLS, KILLS + 1], ids=["ctrl-c with workers", "terminate"])
def test_an_interrupt_ends_in_one_line_that_says_how_to_go_on(story, which):
    stop = story.stops[which]
    assert stop.code == 130
    assert stop.stdout.startswith("images: 12, ")
    said = [line for line in stop.stderr.splitlines() if not line.startswith(("round ", *HARMLESS))]
    go_on = f"`--resume_from_checkpoint latest` goes on from checkpoint-{stop.step}"
    assert said == [f"iet-finetune: interrupted; {go_on}."]


def test_a_run_of_adapters_that_is_killed_ends_in_the_same_files_bit_for_bit(world, tmp_path):
    assert cli.main(["train", *words(flags(world, tmp_path / "whole", **LORA))]) == 0
    output = tmp_path / "out"
    # So early that not even the fastest machine is done by then.
    stops = [stop_training(world, output, lambda p: p.kill(), 0.0, **LORA) for _ in range(2)]
    assert [stop.code for stop in stops] == [-signal.SIGKILL] * 2
    assert any(stop.amid for stop in stops), stops
    AcceleratorState._reset_state(reset_partial_state=True)
    assert cli.main(["train", *words(flags(world, output, **LORA))]) == 0
    ours = repeatable(output)
    assert_same(ours, repeatable(tmp_path / "whole"))
    assert "checkpoint-42/denoiser_remainders.safetensors" in ours
    assert leftovers(output) == []


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
    assert_same(repeatable(output), repeatable(story.whole))


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_of_it(tmp_path, monkeypatch):
    class Killed(BaseException):
        """Stands for a process that is gone."""

    def die(folder: Path, **_: object) -> None:
        if folder.exists():
            next(folder.iterdir()).unlink()
            raise Killed

    pieces = {name: tensors_piece("1", {"w": torch.ones(2)}) for name in ("a.safetensors", "b.safetensors")}
    store = CheckpointStore(tmp_path, limit=1)
    store.save(1, pieces, {})
    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(Killed):
        store.save(2, pieces, {})
    monkeypatch.undo()
    clean(tmp_path)
    resumed = CheckpointStore(tmp_path, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    found = resumed.find("latest")
    assert found is not None
    assert torch.equal(found.tensors("a.safetensors")["w"], torch.ones(2))
