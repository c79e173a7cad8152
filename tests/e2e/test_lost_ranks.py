"""Ranks that are killed, stopped or wrong: all end by themselves, one of them says why, and the run can go on."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState
from e2e.command import (
    ERROR,
    IN_FOUR,
    SCRIPT,
    assert_same,
    by_hand,
    family,
    flags,
    leftovers,
    repeatable,
    run_by_hand,
    run_torchrun,
    started,
    the_line,
    torchrun,
    wait_for,
    words,
)
from e2e.test_kill import newest

from iet_finetune import cli

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

# Seconds; in the flags of every run here, so that all write the same `training_config.yaml`.
TIMEOUT = 6
# A round more, so that four losses fall into it.
RUN = {**IN_FOUR, "num_train_epochs": 8, "ddp_timeout": TIMEOUT}
STEPS = 64
# The time-out, and what a busy machine takes for the rest.
SOON = TIMEOUT + 20
GO_ON = "`--resume_from_checkpoint latest`"


def train(settings: dict[str, Any]) -> int:
    """The command in this process, which is the only rank."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return cli.main(["train", *words(settings)])


def live_clones(output: Path) -> int:
    """How many clones the newest checkpoint caught amid their steps."""
    step, _ = newest(output)
    return len(list((output / f"checkpoint-{step}").glob("shard-*/live.safetensors")))


def reached(output: Path, after: int, live: int) -> bool:
    """Whether the newest checkpoint is later than `after` and has so many live clones."""
    try:
        return newest(output)[0] > after and live_clones(output) == live
    except FileNotFoundError:  # it has just given way to a newer one
        return False


def caught(ranks: list[psutil.Process], output: Path, after: int, live: int) -> bool:
    """Whether `reached` is true while the ranks stand still; if so they are left like that."""
    for how in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            rank.send_signal(how)
        if how == signal.SIGSTOP and reached(output, after, live):
            return True
    return False


@dataclass(frozen=True)
class Loss:
    """How a rank was lost, and what became of the process that was left.

    Attributes:
        step, live: the number of the newest checkpoint then, and how many clones it caught amid their steps.
        code, stderr: of the process that was left: another rank, or the launcher.
        seconds: from the kill to the end of that process.
        orphans: ranks that run on after it.
    """

    step: int
    live: int
    code: int
    stderr: str
    seconds: float
    orphans: list[psutil.Process]


def lose(output: Path, ranks: list[psutil.Process], lost: int, left: "subprocess.Popen[str]") -> Loss:
    """Kills a rank when a new checkpoint has a live clone of each of them; `left` must then end by itself."""
    after, live = newest(output)[0], len(ranks)
    wait_for(lambda: reached(output, after, live) and caught(ranks, output, after, live), left)
    step = newest(output)[0]
    ranks[lost].kill()
    for rank in ranks[:lost] + ranks[lost + 1 :]:
        rank.send_signal(signal.SIGCONT)
    killed = time.monotonic()
    _, stderr = left.communicate(timeout=SOON + 30)
    seconds = time.monotonic() - killed
    orphans = [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    return Loss(step, live, left.returncode, stderr, seconds, orphans)


def lose_by_hand(output: Path, settings: dict[str, Any], lost: int) -> Loss:
    """Kills one of two ranks that no launcher looks after."""
    with by_hand(settings, settings) as ranks:
        return lose(output, [psutil.Process(rank.pid) for rank in ranks], lost, ranks[1 - lost])


def lose_alone(output: Path, settings: dict[str, Any]) -> Loss:
    """Kills the only rank."""
    with started([*SCRIPT, *words(settings)]) as alone:
        return lose(output, [psutil.Process(alone.pid)], 0, alone)


def lose_under_torchrun(output: Path, settings: dict[str, Any], lost: int) -> Loss:
    """Kills one of the two ranks that `torchrun` looks after."""
    with started(torchrun(2, settings)) as launcher:
        wait_for(lambda: len(workers(launcher)) == 2, launcher)
        return lose(output, workers(launcher), lost, launcher)


def workers(launcher: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The ranks that a launcher has started, by number."""
    ranks = {}
    for process in family(launcher)[1:]:
        with contextlib.suppress(psutil.Error, KeyError):  # not yet, or no longer, a rank
            ranks[process.environ()["RANK"]] = process
    return [ranks[number] for number in sorted(ranks)]


@dataclass(frozen=True)
class Story:
    """The folders of a run that lost nobody and of one that lost four ranks, and the losses."""

    whole: Path
    output: Path
    losses: list[Loss]


@pytest.fixture(scope="module")
def story(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Rank 1 of 2 is killed, then the only rank, then rank 0 of 2, then rank 1 under `torchrun`; one rank ends it."""
    folder = tmp_path_factory.mktemp("lost")
    assert train(flags(world, folder / "whole", **RUN)) == 0
    output = folder / "out"
    settings = flags(world, output, **RUN)
    losses = [
        lose_by_hand(output, settings, 1),
        lose_alone(output, settings),
        lose_by_hand(output, settings, 0),
        lose_under_torchrun(output, settings, 1),
    ]
    assert train(settings) == 0
    return Story(folder / "whole", output, losses)


def test_each_loss_hit_the_middle_of_a_round_with_the_clones_of_all_ranks_live(story):
    assert [loss.live for loss in story.losses] == [2, 1, 2, 2]
    steps = [loss.step for loss in story.losses]
    assert 0 < steps[0] < steps[1] < steps[2] < steps[3] < STEPS


@pytest.mark.parametrize(("loss", "lost"), [(0, "rank 1"), (2, "rank 0")])
def test_the_rank_that_is_left_ends_within_the_timeout_and_names_the_lost_one(story, loss, lost):
    ended = story.losses[loss]
    line = the_line(ended.code, ended.stderr)
    assert line.startswith(ERROR)
    assert lost in line
    assert GO_ON in line
    assert f"`--ddp_timeout {TIMEOUT}`" in line
    assert "Traceback" not in ended.stderr
    assert ended.seconds < SOON
    assert ended.orphans == []


def test_torchrun_ends_soon_when_a_rank_is_killed_and_leaves_no_process(story):
    ended = story.losses[-1]
    assert GO_ON in the_line(ended.code, ended.stderr)
    assert ended.seconds < SOON
    assert ended.orphans == []


def test_a_run_that_lost_ranks_and_went_on_with_other_numbers_of_them_ends_in_the_same_files(story):
    assert_same(repeatable(story.output), repeatable(story.whole))
    assert leftovers(story.output) == []


def test_the_run_that_lost_ranks_is_one_in_which_agc_skips(story):
    lines = [json.loads(line) for line in (story.output / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["skip_rate"] < 1 for line in lines[1:])


def test_a_wrong_flag_is_one_line_of_all_ranks(world, tmp_path):
    done = run_torchrun(2, flags(world, tmp_path / "out", num_shards=0))
    assert the_line(done.returncode, done.stderr) == f"{ERROR}`--num_shards` must be at least 1, not 0."
    assert not (tmp_path / "out").exists()


def test_ranks_that_do_not_suit_the_shards_are_refused_with_the_numbers_that_do(world, tmp_path):
    done = run_by_hand(3, flags(world, tmp_path / "out", num_shards=2))
    line = the_line(done.returncode, done.stderr)
    assert line.startswith(f"{ERROR}`--num_shards 2` does not divide 3 ranks into equal groups: ")
    assert "use `--num_shards 1` or 3, or start 2 or 4 ranks" in line


def image_of_shard(trained: Path, shard: int) -> str:
    """The file name of the first image of a shard."""
    ledger = pq.read_table(trained / "ledger.parquet").to_pydict()
    return Path(ledger["image"][ledger["shard"].index(shard)]).name


def test_an_image_that_the_ranks_cannot_read_is_named_once(world, tmp_path):
    data = Path(shutil.copytree(world / "data", tmp_path / "data"))
    broken = data / image_of_shard(world / "trained", 1)
    whole = broken.read_bytes()
    broken.write_bytes(whole[: whole.index(b"IDAT") + 30])
    done = run_by_hand(2, flags(world, tmp_path / "out", train_data_dir=data))
    line = the_line(done.returncode, done.stderr)
    start = f"{ERROR}`--train_data_dir {data}`: 1 image cannot be read (`{broken.name}` cannot be decoded: "
    assert line.startswith(start)


def test_ctrl_c_on_the_launcher_is_one_line_that_says_how_to_go_on(world, tmp_path):
    output = tmp_path / "out"
    with started(torchrun(2, flags(world, output, **IN_FOUR)), launcher=True) as launcher:
        wait_for(lambda: newest(output)[0], launcher)
        launcher.send_signal(signal.SIGINT)
        _, stderr = launcher.communicate(timeout=60)
    line = the_line(launcher.returncode, stderr)
    named = re.fullmatch(f"iet-finetune: interrupted; {GO_ON} goes on from (checkpoint-[0-9]+)\\.", line)
    assert named, line
    assert (output / named[1] / "manifest.json").is_file()


def said_together(*settings: dict[str, Any]) -> str:
    """The one line of two ranks with flags of their own, which must both fail."""
    with by_hand(*settings) as ranks:
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert all(rank.returncode not in (0, None) for rank in ranks)
    return the_line(ranks[0].returncode, "".join(said))


def test_an_output_folder_that_the_ranks_do_not_share_is_refused(world, tmp_path):
    line = said_together(flags(world, tmp_path / "here"), flags(world, tmp_path / "there"))
    assert line.startswith(f"{ERROR}`--output_dir {tmp_path / 'there'}` is not the same folder on all machines")
    assert [os.listdir(tmp_path / name) for name in ("here", "there") if (tmp_path / name).exists()] == [[]]


@pytest.mark.parametrize("other", ["the training data", "`--learning_rate`"])
def test_what_the_ranks_do_not_agree_on_is_named_before_training(world, tmp_path, other):
    data = Path(shutil.copytree(world / "data", tmp_path / "data"))
    shutil.copy(data / "000.png", data / "001.png")
    change: dict[str, Any] = {"train_data_dir": data} if "data" in other else {"learning_rate": 1e-3}
    line = said_together(flags(world, tmp_path / "out"), flags(world, tmp_path / "out", **change))
    assert line.startswith(f"{ERROR}{other} on rank 1 is not that on rank 0: ")
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_timeout(world, tmp_path):
    settings = flags(world, tmp_path / "out", ddp_timeout=TIMEOUT)
    with by_hand(settings, settings) as (first, second):
        second.kill()
        began = time.monotonic()
        _, stderr = first.communicate(timeout=60)
    line = the_line(first.returncode, stderr)
    assert line.startswith(f"{ERROR}the ranks did not come together within `--ddp_timeout {TIMEOUT}` (")
    assert "Traceback" not in stderr
    assert time.monotonic() - began < SOON
