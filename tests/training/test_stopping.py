"""`--stop_when auto` ends a run when held-out images are learned no better, and keeps its best round."""

import json
import re
from pathlib import Path

import pytest
import torch
from runs import assert_equal, run_until, train_on_ranks
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, save_tiny_sd

from iet_finetune import Callback, Config, Trainer, UserError
from iet_finetune.method.objective import NoiseSchedule
from iet_finetune.training import stopping
from iet_finetune.training.stopping import LEVELS, Look, Stopping


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline and 12 images, and a folder of 8 others."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base")
    save_images(folder / "data", 12)
    save_images(folder / "others", 8, seed=1)
    return folder


def config(world: Path, output: Path, **flags) -> Config:
    """Learns fast and soon by heart: the held-out loss is lowest long before the end."""
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"), "train_data_dir": str(world / "data"),
        "holdout_data_dir": str(world / "others"), "output_dir": str(output), "resolution": RESOLUTION,
        "agc_threshold": 0.0, "train_batch_size": 6, "num_shards": 2, "num_train_epochs": 40, "merge_every_epochs": 2,
        "lr_warmup_steps": 0, "learning_rate": 2e-2, "report_to": "none", "stop_when": "auto", "stop_patience": 2,
        "checkpoints_total_limit": 1,
    }  # fmt: skip
    return Config.from_flags(**{**defaults, **flags})


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


def heldout_losses(output: Path) -> dict[int, float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {line["round"]: line["heldout_loss"] for line in lines if "heldout_loss" in line}


class Weights(Callback):
    """Those after each round."""

    def __init__(self):
        self.after = {}

    def on_round_end(self, facts):
        with facts.pipeline() as pipeline:
            self.after[facts.round] = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}


def test_a_run_stops_when_the_held_out_loss_rises_and_keeps_the_best_round(world, tmp_path, capsys, monkeypatch):
    # So few images would be looked at seldom.
    monkeypatch.setattr(stopping, "BUDGET", 10.0)
    before = "from iet_finetune.training import stopping; stopping.BUDGET = 10.0"
    seen = Weights()
    Trainer(config(world, tmp_path / "one"), [seen]).train()
    losses = heldout_losses(tmp_path / "one")
    best = min(losses, key=losses.get)
    looked = sorted(losses)
    assert 2 <= len(looked) < 20
    assert looked.index(best) == len(looked) - 3
    words = f"stopped after round {looked[-1]}: the held-out loss was lowest after round {best}; round {best} is kept"
    assert words in capsys.readouterr().out
    assert_equal(weights(tmp_path / "one"), seen.after[best])
    # On two ranks, and stopped on the way by a kill.
    for ended in train_on_ranks(2, config(world, tmp_path / "two"), before):
        assert ended.code == 0, ended.stderr
    run_until(config(world, tmp_path / "killed"), 4 * looked[-1] - 3)
    Trainer(config(world, tmp_path / "killed", resume_from_checkpoint="latest")).train()
    for name in ("two", "killed"):
        assert_equal(weights(tmp_path / name), weights(tmp_path / "one"))
        assert heldout_losses(tmp_path / name) == losses
    # Resumed once more, it has nothing to do.
    Trainer(config(world, tmp_path / "one", resume_from_checkpoint="latest")).train()
    assert_equal(weights(tmp_path / "one"), seen.after[best])


def test_a_run_that_ends_before_keeps_its_best_round_too(world, tmp_path, capsys):
    Trainer(config(world, tmp_path / "out", num_train_epochs=4, learning_rate=1e-5)).train()
    losses = heldout_losses(tmp_path / "out")
    assert f"took all steps; round {min(losses, key=losses.get)} is kept" in capsys.readouterr().out


def test_looking_changes_no_bit_of_what_is_trained(world, tmp_path):
    """And takes a twentieth of the time at most: two of 24 visits a round, of which a look takes 32 forward passes."""
    seen = [Weights(), Weights()]
    Trainer(config(world, tmp_path / "auto", num_train_epochs=8), seen[:1]).train()
    blind = {"stop_when": "end", "stop_patience": 3, "holdout_data_dir": None}
    Trainer(config(world, tmp_path / "end", num_train_epochs=8, **blind), seen[1:]).train()
    assert "heldout_loss" not in (tmp_path / "end" / "metrics.jsonl").read_text()
    for number in range(1, 5):
        assert_equal(seen[0].after[number], seen[1].after[number])


class FakeLender:
    heldout_hashes = ("h",) * 10

    def __init__(self, losses, visits, passes_a_visit):
        self.found, self.visits, self.passes_a_visit, self.asked = iter(losses), visits, passes_a_visit, 0

    def heldout_losses(self, images, timesteps, seed):
        self.asked += 1
        assert len(images) == 10
        assert len(timesteps) == LEVELS
        return torch.full((10, LEVELS), next(self.found)).exp()


@pytest.mark.parametrize(
    ("passes", "visits", "every"), [(3, 267, 1), (3, 266, 2), (3, 100, 3), (2, 400, 1), (2, 399, 2)]
)
def test_looking_takes_a_twentieth_of_the_time_at_most(passes, visits, every):
    watching, lender = Stopping(patience=2), FakeLender([0.1] * 30, visits, passes)
    objective = NoiseSchedule(torch.linspace(0.999, 0.01, 100).cumprod(0))
    for round_ in range(1, 13):
        watching.look(lender, objective, round_, round_, last=round_ == 11)
    assert [look.round for look in watching.looks] == sorted({*range(every, 13, every), 11})


def test_it_stops_after_so_many_looks_without_a_lower_loss():
    class Rule:
        is_done = False

    watching = Stopping(patience=2)
    for number, loss in enumerate([3.0, 1.0, 2.0, 0.5, 0.5], start=1):
        watching.looks.append(Look(number, 10 * number, loss))
        assert watching.reason([Rule]) is None
    assert watching.best.round == 4
    watching.looks.append(Look(6, 60, 0.6))
    assert watching.reason([Rule]) == "the held-out loss was lowest after round 4"
    again = Stopping(patience=2)
    again.load(json.loads(json.dumps({"looks": watching.state()})))
    assert again == watching
    Rule.is_done = True
    again.forget(lambda look: look.round == 4)
    assert again.best.round == 5
    assert again.reason([Rule]) == "most images are skipped by now"


def test_without_it_the_loss_is_told_and_the_last_round_saved(world, tmp_path, capsys):
    output = Trainer(config(world, tmp_path / "watched", stop_when="end", stop_patience=3)).train()
    said = capsys.readouterr().out
    assert len(heldout_losses(output)) > 1
    assert re.search(
        r"lowest after round \d+ of 20, but the last round is saved: `--stop_when auto` keeps the best one", said
    )


def test_too_few_held_out_images_are_refused(world, tmp_path):
    with pytest.raises(UserError, match="--stop_when auto` compares with held-out images, 8 at least, and"):
        Trainer(config(world, tmp_path / "out", holdout_data_dir=None))


def test_the_ending_says_whether_longer_training_may_help():
    stopping = Stopping(patience=2, looks=[Look(1, 10, 0.5), Look(2, 20, 0.4)])
    assert stopping.ending(None, 2) == (
        "took all steps; round 2 is kept; the held-out loss was still falling, so longer training may help"
    )
    stopping.looks.append(Look(3, 30, 0.6))
    assert stopping.ending(None, 3) == "took all steps; round 2 is kept"
    assert stopping.ending("enough", 3) == "stopped after round 3: enough; round 2 is kept"
