"""Skip rules by themselves: what one sees of samples, what it need not define, and AGC as one of them."""

from types import SimpleNamespace

import pytest
import torch

from iet_finetune import AntiGradientControl
from iet_finetune.method.agc_rule import AGCRule
from iet_finetune.method.objective import NoiseSchedule, per_sample_loss
from iet_finetune.method.rules import Samples, SkipRule

T = 20
OBJECTIVE = NoiseSchedule(torch.linspace(0.99, 0.01, T))
FACTS = {"objective": OBJECTIVE, "num_images": 5, "device": torch.device("cpu")}


def samples(loss, timesteps, **more):
    members = torch.arange(len(loss))
    return Samples(torch.tensor(loss), torch.tensor(timesteps), members, torch.arange(5) * 10, OBJECTIVE, **more)


def agc_rule(threshold, bins=None):
    return AGCRule(
        SimpleNamespace(agc_threshold=threshold, agc_decay=0.5, agc_bins=bins, agc_bias_correction=False), **FACTS
    )


@pytest.mark.parametrize("bins", [None, 4])
def test_agc_as_a_rule_decides_and_learns_as_in_other_peoples_loops(bins):
    rule, agc = agc_rule(0.9, bins), AntiGradientControl(bins or T, 0.9, 0.5)
    generator = torch.Generator().manual_seed(0)
    skipped = 0
    for _ in range(30):
        seen = samples(
            torch.rand(5, generator=generator).tolist(), torch.randint(T, (5,), generator=generator).tolist()
        )
        places = seen.timesteps * (bins or T) // T
        assert torch.equal(rule.expected_loss(seen), agc.expected_loss(places)) or not agc.count[places].all()
        keep = agc.keep_mask(seen.loss, places)
        assert torch.equal(rule.keep(seen), keep)
        rule.update(seen)
        agc.update(seen.loss, places)
        skipped += int((~keep).sum())
    assert skipped > 10
    assert all(torch.equal(rule.state_dict()[name], tensor) for name, tensor in agc.state_dict().items())


def test_a_threshold_of_0_switches_agc_off_whatever_the_losses_are():
    rule = agc_rule(0.0)
    rule.agc.bank.fill_(1e9)
    assert rule.is_off
    assert not agc_rule(0.1).is_off
    assert rule.keep(samples([0.0, torch.nan], [0, 1])).all()


def test_the_state_of_agc_goes_on_in_another_rule():
    rule, other = agc_rule(0.9), agc_rule(0.9)
    rule.update(samples([1.0, 2.0], [0, 3]))
    other.load_state_dict(rule.state_dict())
    assert other.keep(samples([0.5, 0.5], [0, 3])).tolist() == [True, False]


def test_samples_know_their_images_their_noise_level_and_what_another_network_loses_on_them():
    target = torch.ones(2, 1, 2, 2)
    seen = samples([1.0, 2.0], [0, 19], target=target, predict=lambda network: network(torch.zeros(2, 1, 2, 2)))
    assert seen.images.tolist() == [0, 10]
    assert seen.level(10).tolist() == [0, 9]
    assert torch.equal(
        seen.loss_of(lambda latents: latents + 3), per_sample_loss(torch.full((2, 1, 2, 2), 3.0), target)
    )


def test_a_whole_step_says_that_its_latents_are_gone():
    with pytest.raises(ValueError, match="only `keep`, `note` and `instead`"):
        samples([1.0], [0]).loss_of(lambda latents: latents)


def test_a_rule_need_only_decide():
    class HighLoss(SkipRule):
        def keep(self, samples):
            return samples.loss > self.config

    rule, seen = HighLoss(0.5, **FACTS), samples([0.4, 0.6], [0, 1])
    assert rule.keep(seen).tolist() == [False, True]
    rule.update(seen)
    rule.load_state_dict(rule.state_dict())
    assert rule.instead(seen) is None
    assert rule.note(seen) is None
    assert rule.expected_loss(seen).isnan().all()
    assert not rule.is_off
