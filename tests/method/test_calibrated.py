"""Calibrated AGC by itself: against a slow version of its formula, and what it keeps from one step to the next."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from iet_finetune.method.calibrated import CalibratedAGC
from iet_finetune.method.objective import FlowMatching, NoiseSchedule
from iet_finetune.method.rules import Samples

T = 20
OBJECTIVE = NoiseSchedule(torch.linspace(0.99, 0.01, T))
USUAL = {"tau": 1.0, "decay": 0.8, "visits": 2, "cap": 0.3, "below": 0.4, "every": 1}


def settings(**changed):
    return SimpleNamespace(**{f"calibrated_{name}": value for name, value in {**USUAL, **changed}.items()})


def rule(images, **changed):
    made = CalibratedAGC(settings(**changed), objective=OBJECTIVE, num_images=images, device=torch.device("cpu"))
    made.begin_round(SimpleNamespace(lend=lambda which: which))
    return made


def samples(members, loss, reference, timesteps, images):
    """Of a micro-batch: the network `base` predicts so that it loses what `reference` says."""

    def predict(network):
        assert network == "base"
        return torch.as_tensor(reference, dtype=torch.float32).sqrt()[:, None, None, None]

    tensors = (torch.as_tensor(loss, dtype=torch.float32), torch.as_tensor(timesteps), torch.as_tensor(members))
    return Samples(*tensors, torch.arange(images), OBJECTIVE, torch.zeros(len(members), 1, 1, 1), predict)


def whole(seen, noted):
    noted = torch.full_like(seen.loss, torch.nan) if noted is None else noted
    return Samples(seen.loss, seen.timesteps, seen.members, seen.shard, OBJECTIVE, noted=noted)


def take(made, seen):
    """One step, as training takes it; whether each sample was kept."""
    keep, noted = made.keep(seen), made.note(seen)
    made.update(whole(seen, noted))
    return keep


def passes(rng, images, size, count):
    """Steps of some passes over a shard: members, losses, losses of the reference, timesteps, and whether it ends."""
    for _ in range(count):
        order = rng.permutation(images)
        for start in range(0, images, size):
            members = order[start : start + size]
            loss, reference = np.exp(rng.normal(size=(2, len(members)))).astype(np.float32)
            loss[rng.random(len(members)) < 0.1] = rng.choice([np.nan, np.inf])
            yield (members, loss, reference, rng.integers(T, size=len(members))), start + size >= images


class Slow:
    """The formula, a sample and an image at a time, in float64."""

    def __init__(self, images, **changed):
        self.__dict__ |= {**USUAL, **changed, "images": images}
        self.entered = [[] for _ in range(images)]
        self.skipped, self.passes = set(), 0

    def step(self, members, loss, reference, timesteps, ends):
        kept = [not (i in self.skipped and t / T < self.below) for i, t in zip(members, timesteps, strict=True)]
        if self.passes % self.every == 0:
            for i, mine, other, t in zip(members, loss, reference, timesteps, strict=True):
                if t / T < self.below and np.isfinite(mine):
                    self.entered[i].append(np.log(np.float64(mine)) - np.log(np.float64(other)))
            if ends:
                self.skipped = self.judged()
        self.passes += ends
        return kept

    def mean(self, i):
        weights = [self.decay**age for age in reversed(range(len(self.entered[i])))]
        return float(np.average(self.entered[i], weights=weights))

    def judged(self):
        known = {i: self.mean(i) for i in range(self.images) if len(self.entered[i]) >= self.visits}
        if not known:
            return set()
        median = lower_median(known.values())
        deviation = 1.4826 * lower_median(abs(value - median) for value in known.values())
        # A shard of one or two images that is known has no deviation.
        score = {i: (median - value) / max(deviation, 1e-6) for i, value in known.items()}
        order = sorted(score, key=score.get, reverse=True)
        most = int(self.cap * self.images)
        # The two versions round differently: nothing may be on the edge.
        edges = [abs(score[i] - self.tau) for i in order]
        edges += [score[a] - score[b] for a, b in zip(order[most - 1 : most], order[most : most + 1], strict=False)]
        assume(all(edge > 1e-3 for edge in edges))
        return {i for i in order[:most] if score[i] > self.tau}


def lower_median(values):
    """As torch takes it."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


@given(
    st.integers(0, 2**32 - 1), st.integers(2, 24), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3),
    st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.1, 0.25, 1.0]),
)  # fmt: skip
def test_it_decides_as_the_formula_says(seed, images, size, every, visits, decay, tau, cap):
    flags = {"every": every, "visits": visits, "decay": decay, "tau": tau, "cap": cap}
    fast, slow = rule(images, **flags), Slow(images, **flags)
    for step, ends in passes(np.random.default_rng(seed), images, size, 6):
        kept = take(fast, samples(*step, images))
        assert kept.tolist() == slow.step(*step, ends)
    assert fast.visits.tolist() == [len(each) for each in slow.entered]
    for i in np.flatnonzero([len(each) > 0 for each in slow.entered]):
        assert float(fast.mean[i] / (1 - decay ** fast.visits[i])) == pytest.approx(slow.mean(i), rel=1e-4, abs=1e-5)
    assert set(torch.nonzero(fast.skipped).flatten().tolist()) == slow.skipped
    assert len(slow.skipped) <= cap * images


def settled(images=20, fallen=(3,), **changed):
    """After four passes in which the losses of some images fell by far, and those of others hardly."""
    made = rule(images, **{"tau": 2.0, **changed})
    for _ in range(4):
        take(made, one_pass(images, fallen))
    return made


def one_pass(images, fallen=()):
    """All images at the least noise, in one step."""
    loss = 1 + 0.01 * torch.arange(images)
    loss[list(fallen)] = 0.1
    return samples(torch.arange(images), loss, torch.ones(images), torch.zeros(images, dtype=torch.int64), images)


def test_what_is_skipped_teaches_where_there_is_much_noise():
    made, everywhere = settled(), torch.arange(T)
    for image in (2, 3):
        seen = samples(torch.full((T,), image), torch.ones(T), torch.ones(T), everywhere, 20)
        assert made.keep(seen).tolist() == [image != 3 or t >= 0.4 * T for t in range(T)]


def test_an_image_that_is_forgotten_is_no_longer_skipped():
    made = settled()
    assert made.skipped.nonzero().tolist() == [[3]]
    skipped = []
    for _ in range(20):
        take(made, one_pass(20))
        skipped.append(bool(made.skipped[3]))
    assert skipped[0]
    assert skipped == sorted(skipped, reverse=True)
    assert not skipped[-1]


def test_no_more_than_the_cap_are_skipped_and_those_that_fell_furthest():
    made = settled(40, fallen=range(12), cap=0.2)
    assert made.skipped.sum() == 8
    assert settled(40, fallen=range(12), cap=1.0).skipped.nonzero().flatten().tolist() == list(range(12))


def test_equal_losses_skip_nothing():
    made = rule(8)
    for _ in range(5):
        take(made, samples(torch.arange(8), torch.ones(8), torch.ones(8), torch.zeros(8, dtype=torch.int64), 8))
    assert not made.skipped.any()


def test_the_reference_is_asked_in_every_nth_pass_alone():
    made, asked = rule(6, every=3), []
    for step, _ in passes(np.random.default_rng(0), 6, 4, 7):
        seen = samples(*step, 6)
        asked.append(made.note(seen) is not None)
        take(made, seen)
    assert asked == [p % 3 == 0 for p in range(7) for _ in range(2)]


def test_the_ledger_is_told_the_loss_of_the_reference_where_it_was_compared():
    made = rule(4)
    seen = samples(torch.arange(3), torch.ones(3), torch.tensor([4.0, 9.0, 16.0]), torch.tensor([0, 7, 8]), 4)
    told = made.expected_loss(whole(seen, made.note(seen)))
    assert told[:2].tolist() == [4.0, 9.0]
    assert told[2].isnan()
    assert made.expected_loss(seen).isnan().all()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_rule_that_is_loaded_goes_on_as_if_it_had_not_stopped(steps):
    course = list(passes(np.random.default_rng(4), 10, 4, 6))
    flags = {"every": 2, "tau": 0.3, "visits": 1, "below": 0.7}
    one, other = rule(10, **flags), rule(10, **flags)
    for number, (step, _) in enumerate(course):
        if number % steps == 0:
            loaded = rule(10, **flags)
            loaded.load_state_dict(other.state_dict())
            other = loaded
        assert torch.equal(take(one, samples(*step, 10)), take(other, samples(*step, 10)))
        assert str(one.state_dict()) == str(other.state_dict())
    assert one.skipped.any()


@pytest.mark.parametrize(
    ("visits", "images", "objective", "changed", "words"),
    [
        (40 * 50, 40, OBJECTIVE, {}, None),
        (40 * 5, 40, OBJECTIVE, {}, None),
        (40 * 4, 40, OBJECTIVE, {}, "looked at 1.6 times on average, and `--calibrated_visits` asks for 2."),
        (40 * 8, 40, OBJECTIVE, {"every": 2}, "looked at 1.6 times"),
        (3 * 50, 3, OBJECTIVE, {}, "`--calibrated_cap 0.3` of a shard of 3 images is less than one image."),
        # Levels that are drawn in the middle more often.
        (40 * 8, 40, FlowMatching(torch.linspace(1, 0.01, 100), "logit_normal", -2.0), {}, "hardly skip anything"),
    ],
)
def test_it_says_where_it_can_hardly_act(visits, images, objective, changed, words):
    found = CalibratedAGC.doubt(settings(**changed), objective, visits, images)
    assert found is None if words is None else words in found
