"""The guard: images rest that a slow version of its formula says, within its budget, alike on any number of ranks."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import assert_equal, run_until, train_on_ranks
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, save_tiny_sd

from iet_finetune import Config, Trainer, UserError
from iet_finetune.config.registry import SKIP_RULES
from iet_finetune.method.deviations import deviations_below, separation
from iet_finetune.method.guard import CHOOSERS, Guard
from iet_finetune.method.objective import FlowMatching, NoiseSchedule
from iet_finetune.method.rules import Samples

ALPHAS = torch.linspace(0.999, 0.01, 100).cumprod(0)


class FakeRun:
    """Losses that fall as they are told to: those of an image times `left[image]` a round.

    Args:
        at: draws at which they do; all if None.
    """

    passes_a_visit = 3

    def __init__(self, left, heldout=20, visits=10**6, rounds=10**3, at=None):
        self.content_hashes = [hashlib.md5(str(i).encode()).hexdigest() for i in range(len(left))]
        self.heldout_hashes = [f"h{i}" for i in range(heldout)]
        self.left, self.visits, self.round, self.asked = left, visits, 0, []
        self.rounds, self.at, self.draws, self.kept = rounds, at, [], []

    @property
    def rounds_left(self):
        return self.rounds - self.round

    def keep_reference(self):
        self.kept.append(self.round)

    def lend(self, which):
        assert which == "reference"
        return "reference"

    def losses(self, which, images, timesteps, seed, *, heldout=False, draws=None):
        assert which == "result"
        images = list(images)
        draws = list(range(len(timesteps))) if draws is None else draws
        self.draws.append(draws)
        self.asked.append((self.round, heldout, images))
        start = torch.tensor([[(7 * i + 3 * j) % 11 + 1.0 for j in draws] for i in images])
        # Held-out losses fall by half in the mean, and one differs from the next.
        left = [0.5 + 0.01 * (i % 5 - 2) if heldout else self.left[i] for i in images]
        falls = [[each if heldout or self.at is None or j in self.at else 0.5 for j in draws] for each in left]
        return start * torch.tensor(falls) ** self.round


def guard(count=6, objective=None, **flags):
    _, settings = Config.from_flags(skip_rule="guard", **flags).chosen(SKIP_RULES)
    return Guard(settings, objective=objective or NoiseSchedule(ALPHAS), num_images=count, device=torch.device("cpu"))


def rounds(rule, run, count):
    for number in range(run.round, count):
        run.round = number
        rule.begin_round(run)


def looks(run):
    """How often each image was looked at after the reference round."""
    asked = [images for round_, heldout, images in run.asked if not heldout and round_ > 0]
    return np.bincount([image for images in asked for image in images])


def test_an_image_rests_while_its_loss_is_down_further_than_that_of_others():
    run = FakeRun([0.5, 0.45, 0.5, 0.1, 0.55, 0.5])
    rule = guard(guard_reference=0)
    rounds(rule, run, 2)
    assert rule.resting.tolist() == [False, True, False, True, False, False]
    run.left[3] = 2.0
    rounds(rule, run, 3)
    assert rule.resting.tolist() == [False, True, False, False, False, False]


def test_the_score_is_what_the_formula_says():
    run = FakeRun([0.4, 0.6, 0.45])
    rule = guard(3, guard_reference=2, guard_draws=2, guard_tau=2.0)
    rounds(rule, run, 2)
    assert run.asked == []
    assert not rule.resting.any()
    rounds(rule, run, 5)
    fallen = np.log([0.4, 0.6, 0.45]) * 2
    usual = np.log([0.5 + 0.01 * (i % 5 - 2) for i in range(20)]) * 2
    # torch's median of an even number is the lower of the two in the middle.
    median = np.sort(usual)[9]
    scores = (median - fallen) / (1.4826 * np.sort(abs(usual - median))[9])
    np.testing.assert_allclose(rule.about_images()["guard_score"], scores, rtol=1e-3)
    assert rule.about_images()["rests"].tolist() == (scores > 2).tolist()


@pytest.mark.parametrize("objective", [NoiseSchedule(ALPHAS), FlowMatching(torch.linspace(1, 0.01, 100))])
def test_resting_images_go_on_teaching_where_there_is_much_noise(objective):
    rule = guard(objective=objective, guard_below=0.3)
    rule.resting = torch.tensor([False, True])
    timesteps, shard = torch.arange(100), torch.tensor([0, 1])
    for image in (0, 1):
        members = torch.full((100,), image)
        keep = rule.keep(Samples(torch.ones(100), timesteps, members, shard, objective))
        much = objective.levels(timesteps, 1000) >= 300
        assert 65 <= much.sum() <= 75
        assert torch.equal(keep, much if image else torch.ones_like(much))


def test_looking_takes_no_more_than_the_budget_and_all_take_turns():
    run = FakeRun([0.5] * 100, heldout=10, visits=300)
    rule = guard(100, guard_reference=0, guard_budget=0.1)
    rounds(rule, run, 40)
    assert [len(images) for round_, _, images in run.asked if round_ == 0] == [100, 10]
    images = sum(len(images) for round_, _, images in run.asked if round_ > 0)
    # Three forward passes an image; a visit counts as three of them.
    assert 0.9 * 0.1 * 300 * 39 < images <= 0.1 * 300 * 39
    assert looks(run).max() - looks(run).min() <= 1


def test_images_near_to_resting_are_looked_at_more_often():
    run = FakeRun([0.5] * 90 + [0.485] * 10, heldout=10, visits=300)
    rule = guard(100, guard_reference=0, guard_budget=0.1)
    rounds(rule, run, 60)
    assert looks(run)[90:].min() > 1.5 * looks(run)[:90].max()


def test_what_is_there_more_often_is_looked_at_sooner():
    run = FakeRun([0.5] * 100, heldout=10, visits=300)
    run.content_hashes[90:] = run.content_hashes[89:90] * 10
    rule = guard(100, guard_reference=0, guard_budget=0.1)
    rounds(rule, run, 30)
    assert [89 in images for round_, heldout, images in run.asked if not heldout and round_ in (1, 2, 3)] == [True] * 3
    assert looks(run)[:89].min() > 0


@pytest.mark.parametrize("budget", [0.05, 0.3])
def test_images_whose_turn_cannot_come_before_the_end_get_no_reference_and_all_else_stays_the_same(budget):
    left = np.random.default_rng(0).uniform(0.45, 0.55, 100).tolist()
    found = []
    for limit in (10**3, 8):
        run = FakeRun(left, heldout=10, visits=300, rounds=limit)
        run.content_hashes[90:] = run.content_hashes[89:90] * 10
        rule = guard(100, guard_reference=1, guard_budget=budget)
        rounds(rule, run, 8)
        of_training = [(round_, images) for round_, heldout, images in run.asked if not heldout]
        found.append((of_training[1:], rule.about_images()["guard_score"].tolist()))
        referred = of_training[0][1]
    assert found[0] == found[1]
    assert {image for _, images in found[0][0] for image in images} <= set(referred)
    # 5 more images a round, or 80.
    assert len(referred) == {0.05: 30, 0.3: 90}[budget]


def test_the_levels_are_kept_at_which_training_images_have_fallen_furthest():
    run = FakeRun([0.1] * 60 + [0.5] * 140, heldout=20, visits=300, at=(2, 3, 6, 7))
    levels = (0.01, 0.02, 0.04, 0.08)
    flags = {"guard_levels": levels, "guard_best_levels": 2, "guard_draws": 2, "guard_reference": 0}
    rule = guard(200, guard_budget=0.1, **flags)
    rounds(rule, run, 4)
    counts = {
        (round_, heldout): (len(images), draws)
        for (round_, heldout, images), draws in zip(run.asked, run.draws, strict=True)
    }
    assert counts[0, False] == (200, list(range(8)))
    assert counts[1, False] == (CHOOSERS, list(range(8)))
    # 90 forward passes a round, of which 80 are for held-out images.
    assert counts[2, False] == (2, [2, 3, 6, 7])
    assert counts[2, True] == (20, [2, 3, 6, 7])
    again = guard(200, guard_budget=0.1, **flags)
    again.load_state_dict(rule.state_dict())
    for each in (rule, again):
        run.round = 4
        each.begin_round(run)
    assert torch.equal(rule.resting, again.resting)
    assert rule.resting.any()


@given(st.integers(0, 2**32))
def test_separation_is_what_its_formula_says(seed):
    rng = np.random.default_rng(seed)
    values, usual = rng.normal(size=(13, 2)), rng.normal(size=(9, 2))
    for j, found in enumerate(separation(torch.from_numpy(values), torch.from_numpy(usual))):
        median = np.sort(usual[:, j])[4]
        z = [(median - each[:, j]) / (1.4826 * np.sort(abs(usual[:, j] - median))[4]) for each in (values, usual)]
        assert found.item() == pytest.approx(np.sort(z[0])[-3:].mean() - np.sort(z[1])[-2:].mean())


def test_resting_images_learn_what_the_reference_predicts():
    run = FakeRun([0.5, 0.1, 0.5])
    rule = guard(3, guard_reference=1, guard_pull=0.5)
    samples = Samples(
        torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1), torch.arange(3), rule.objective
    )
    samples = replace(samples, predict=lambda network: network)
    rounds(rule, run, 2)
    assert rule.instead(samples) is None, "none rests at the reference round"
    rounds(rule, run, 3)
    assert set(run.kept) == {1}
    assert rule.instead(samples) == ("reference", 0.5)
    silent = guard(3, guard_reference=0)
    rounds(silent, run, 4)
    assert silent.instead(samples) is None


def test_copies_of_a_file_are_looked_at_once_and_rest_together():
    run = FakeRun([0.1, 0.5, 0.5, 0.1])
    run.content_hashes[3] = run.content_hashes[0]
    rule = guard(4, guard_reference=0)
    rounds(rule, run, 2)
    assert all(3 not in images for _, heldout, images in run.asked if not heldout)
    assert rule.resting.tolist() == [True, False, False, True]


def test_a_rule_that_is_loaded_goes_on_as_if_it_had_not_stopped():
    def new():
        return guard(20, guard_reference=1, guard_budget=0.2)

    def loaded(rule):
        again = new()
        again.load_state_dict(rule.state_dict())
        return again

    run = FakeRun(np.linspace(0.3, 0.6, 20).tolist(), heldout=8, visits=100)
    whole, stopped = new(), new()
    for run.round in range(9):
        whole.begin_round(run)
        # Before a round, and within it.
        for _ in range(2):
            stopped = loaded(stopped)
            stopped.begin_round(run)
        assert torch.equal(whole.resting, stopped.resting)
        assert str(whole.state_dict()) == str(stopped.state_dict())
    assert whole.resting.any()


def test_deviations_of_equal_values_are_finite():
    assert deviations_below(torch.tensor([1.0, 2.0]), torch.ones(9)).isfinite().all()


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline, and 20 images, of which 8 are held out."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base")
    save_images(folder / "data", 20)
    return folder


GUARD = {"guard_reference": 0, "guard_tau": 0.1, "guard_below": 1.0, "guard_budget": 1.0}


def config(world: Path, output: Path, skip_rule: str = "guard", **flags) -> Config:
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"), "train_data_dir": str(world / "data"),
        "holdout_fraction": 0.4, "output_dir": str(output), "skip_rule": skip_rule,
        **(GUARD if skip_rule == "guard" else {}), "resolution": RESOLUTION, "train_batch_size": 2,
        "num_shards": 2, "num_train_epochs": 3, "merge_every_epochs": 1, "lr_warmup_steps": 0, "learning_rate": 3e-3,
        "adam_epsilon": 1e-2, "report_to": "none", "use_ema": True, "checkpointing_steps": 4,
    }  # fmt: skip
    return Config.from_flags(**{**defaults, **flags})


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


# The adapter's merges leave remainders below it, which differ from round to round.
PULLED_LORA = {"guard_pull": 1.0, "use_lora": True, "rank": 1, "lora_export": "fuse", "learning_rate": 0.05}


@pytest.mark.parametrize("extra", [{}, PULLED_LORA], ids=["rest", "pull, lora"])
def test_a_guarded_run_has_the_same_bits_on_ranks_and_after_a_stop_and_tells_in_the_ledger(world, tmp_path, extra):
    Trainer(config(world, tmp_path / "one", **extra)).train()
    for ended in train_on_ranks(2, config(world, tmp_path / "two", **extra)):
        assert ended.code == 0, ended.stderr
    assert_equal(weights(tmp_path / "one"), weights(tmp_path / "two"))
    # Stopped in the midst of a round: the second one, in which the first images rest.
    run_until(config(world, tmp_path / "stopped", **extra), 10)
    Trainer(config(world, tmp_path / "stopped", resume_from_checkpoint="latest", **extra)).train()
    assert_equal(weights(tmp_path / "one"), weights(tmp_path / "stopped"))
    ledgers = [pq.read_table(tmp_path / name / "ledger.parquet") for name in ("one", "two", "stopped")]
    assert ledgers[0] == ledgers[1] == ledgers[2]
    ledger = ledgers[0].to_pydict()
    assert any(ledger["rests"][:12])
    assert sum(ledger["skipped"]) > 0
    assert [row is None for row in ledger["guard_score"]] == [False] * 12 + [True] * 8


def test_four_clones_that_leave_copies_out_pull_and_stop_have_the_same_bits_on_one_two_and_four_ranks(world, tmp_path):
    flags = {"num_shards": 4, "train_batch_size": 1, "dedup": "near", "stop_when": "auto", "num_train_epochs": 2}
    flags |= {"guard_pull": 1.0, "guard_best_levels": 2}
    Trainer(config(world, tmp_path / "1", **flags)).train()
    for ranks in (2, 4):
        for ended in train_on_ranks(ranks, config(world, tmp_path / str(ranks), **flags)):
            assert ended.code == 0, ended.stderr
    ledgers = [pq.read_table(tmp_path / str(ranks) / "ledger.parquet") for ranks in (1, 2, 4)]
    assert ledgers[0] == ledgers[1] == ledgers[2]
    assert sum(ledgers[0].to_pydict()["skipped"]) > 0
    for ranks in (2, 4):
        assert_equal(weights(tmp_path / "1"), weights(tmp_path / str(ranks)))


def test_without_images_that_rest_the_guard_changes_nothing(world, tmp_path):
    for name, flags in {"guard": {"guard_tau": 1e6}, "plain": {"skip_rule": "agc", "agc_threshold": 0.0}}.items():
        Trainer(config(world, tmp_path / name, num_train_epochs=2, **flags)).train()
    assert_equal(weights(tmp_path / "guard"), weights(tmp_path / "plain"))


def test_with_lora_there_is_no_second_denoiser(world, tmp_path):
    flags = {"use_lora": True, "rank": 2, "num_train_epochs": 2}
    trainer = Trainer(config(world, tmp_path / "out", **flags))
    plain = Trainer(config(world, tmp_path / "plain", skip_rule="agc", **flags))
    assert trainer.run.need == plain.run.need
    trainer.train()
    assert trainer.run.lender._lent == {}


def test_to_pull_takes_another_adapter_and_gradients_apart(world, tmp_path):
    flags = {"use_lora": True, "rank": 2, "num_shards": 1}
    without, pulls = (Trainer(config(world, tmp_path / str(w), guard_pull=w, **flags)) for w in (0.0, 1.0))
    adapter = sum(parameter.nbytes for parameter in pulls.model.trainable.parameters.values())
    assert pulls.run.need.device - without.run.need.device == 2 * adapter
    assert pulls.run.need.checkpoint - without.run.need.checkpoint == adapter


def test_too_few_held_out_images_are_refused(world, tmp_path):
    with pytest.raises(UserError, match="compares with held-out images, 8 at least, and there are 2: "):
        Trainer(config(world, tmp_path / "out", holdout_fraction=0.1))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"guard_levels": (0.0, 0.1)}, "`--guard_levels` must be between 0 and 1, not 0.0 0.1."),
        ({"guard_tau": 0}, "`--guard_tau` must be above 0"),
        ({"guard_below": 1.5}, "`--guard_below` must be in (0, 1], not 1.5."),
        ({"guard_budget": 0.0}, "`--guard_budget` must be above 0"),
        ({"guard_pull": -1.0}, "`--guard_pull` must be 0 or more, not -1.0."),
        ({"guard_best_levels": 0}, "`--guard_best_levels` must be at least 1"),
        ({"guard_best_levels": 4}, "`--guard_best_levels 4` is more than the 3 of `--guard_levels`"),
        ({"guard_draws": 0}, "`--guard_draws` must be at least 1"),
        ({"guard_reference": -1}, "`--guard_reference`"),
    ],
)
def test_settings_out_of_range_are_named(flags, words):
    with pytest.raises(UserError) as caught:
        Config.from_flags(**flags)
    assert words in str(caught.value)
