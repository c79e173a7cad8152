"""Sums by round, and files of lines that a killed process may leave half written."""

import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from iet_finetune.ensemble.meter import RoundMeter, RoundSums
from iet_finetune.training.tracking import Progress, Trackers, append_line, cut_back, read_lines


def filled():
    meter = RoundMeter(torch.device("cpu"))
    good = torch.tensor(False)
    meter.record(0, torch.tensor([1.0, 2.0]), torch.tensor([0, 9]), torch.tensor([True, False]), good)
    meter.record(1, torch.tensor([3.0, math.nan]), torch.tensor([0, 0]), torch.tensor([True, False]), ~good)
    meter.record(2, torch.tensor([math.inf]), torch.tensor([5]), torch.tensor([False]), ~good)
    return meter


def test_a_meter_tells_losses_skips_and_the_first_broken_step():
    sums = filled().read()
    assert sums.loss_sum == 6.0
    assert sums.broken_step == 1
    assert sums.skip_rate == 3 / 5
    assert sums.skip_rate_by_level == [1 / 3, None, None, None, None, 1.0, None, None, None, 1.0]


def test_a_cleared_meter_tells_nothing():
    meter = filled()
    meter.clear()
    sums = meter.read()
    assert math.isnan(sums.loss)
    assert (sums.skip_rate, sums.broken_step) == (0.0, -1)


def test_what_came_since_is_the_difference_and_a_whole_the_sum():
    sums = filled().read()
    assert sums.combined(sums, -1).seen == [0.0] * 10
    assert sums.combined(RoundSums.nothing()).loss == sums.loss
    assert sums.combined(sums).loss_sum == 12.0


def test_a_half_written_line_does_not_count_and_later_rounds_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    for number in (1, 2, 3):
        append_line(path, {"round": number})
    with path.open("a") as stream:
        stream.write('{"round": 4, "lo')
    assert [line["round"] for line in read_lines(path)] == [1, 2, 3]
    cut_back(path, 2)
    assert path.read_text() == "".join(json.dumps({"round": number}) + "\n" for number in (1, 2))
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("rounds", [0, 5])
def test_cutting_back_a_file_that_is_not_there_makes_an_empty_one(tmp_path, rounds):
    cut_back(tmp_path / "metrics.jsonl", rounds)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


class Terminal(io.StringIO):
    """Looks like a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_bar_tells_place_loss_skip_rate_speed_and_time_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(total_steps=40, done=10)
    for step in range(11, 16):
        progress.reach(step, 8)
    progress.describe("round 1/3 shard 2/4", 0.1234, 0.25)
    progress.reach(16, 8)
    progress._bar.refresh()
    progress.close()
    shown = sys.stderr.getvalue().split("\r")[-1]
    for part in ("round 1/3 shard 2/4", "16/40", "loss 0.1234", "skipped 25.0%", "images/s", "<"):
        assert part in shown, shown


def test_without_a_terminal_there_are_lines_and_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = Progress(total_steps=40, done=0)
    progress.reach(1, 8)
    progress.describe("round 1/3 shard 2/4", 0.1, 0.2)
    progress.say("round 1/3: done")
    progress.close()
    assert sys.stderr.getvalue() == "round 1/3: done\n"


class Tracker:
    """Keeps what is logged."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, []

    def log(self, values, step):
        self.seen.append((step, values))


def test_each_shard_has_curves_of_its_own_over_the_steps_of_its_clone():
    board, other = Tracker("tensorboard"), Tracker("wandb")
    accelerator = SimpleNamespace(trackers=[board, other], init_trackers=lambda *_: None)
    trackers = Trackers(accelerator, "project", {})
    # Two clones of a run, which take ten steps each, one after the other.
    trackers.log_clone({"loss": 0.5}, "shard-0/", 10, 10)
    trackers.log_clone({"loss": 0.4}, "shard-1/", 10, 20)
    assert board.seen == [(10, {"shard-0/loss": 0.5}), (10, {"shard-1/loss": 0.4})]
    assert other.seen == [
        (10, {"shard-0/loss": 0.5, "shard-0/step": 10}),
        (20, {"shard-1/loss": 0.4, "shard-1/step": 10}),
    ]
