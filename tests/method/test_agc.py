"""Anti-gradient control against the paper's formula, computed one sample at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from iet_finetune import AntiGradientControl

T = 6
losses = st.floats(0.0, 100.0, width=32)
batch = st.lists(st.tuples(losses, st.integers(0, T - 1)), min_size=1, max_size=24)


def sequential(batches, threshold, decay):
    """Keep masks, losses and bank from the formula, in double precision and one sample after the other."""
    bank = [0.0] * T
    results = []
    for samples in batches:
        keep = [loss >= threshold * bank[t] for loss, t in samples]
        margin = min((abs(loss - threshold * bank[t]) for loss, t in samples if bank[t] > 0), default=math.inf)
        kept = [loss for (loss, _), k in zip(samples, keep, strict=True) if k]
        for loss, t in samples:
            bank[t] = decay * bank[t] + (1 - decay) * loss
        results.append((keep, sum(kept) / max(len(kept), 1), margin))
    return results, bank


@given(st.lists(batch, min_size=1, max_size=6), st.floats(0.0, 0.99), st.floats(0.0, 0.99))
def test_batches_with_repeated_timesteps_equal_the_sequential_formula(batches, threshold, decay):
    agc = AntiGradientControl(T, threshold, decay)
    expected, bank = sequential(batches, threshold, decay)
    for samples, (keep, mean, margin) in zip(batches, expected, strict=True):
        loss = torch.tensor([loss for loss, _ in samples])
        timesteps = torch.tensor([t for _, t in samples])
        mask = agc.keep_mask(loss, timesteps)
        result = agc(loss, timesteps)
        # Within rounding of the threshold itself either decision is right.
        if margin > 1e-4:
            assert mask.tolist() == keep
            assert result.item() == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert agc.bank.tolist() == pytest.approx(bank, rel=1e-5, abs=1e-6)


@given(st.lists(batch, min_size=1, max_size=6), st.floats(0.0, 0.99), st.floats(0.0, 0.99))
def test_corrected_for_its_start_the_bank_is_the_weighted_mean_of_the_losses_so_far(batches, threshold, decay):
    agc = AntiGradientControl(T, threshold, decay, bias_correction=True)
    before: dict[int, list[float]] = {t: [] for t in range(T)}
    for samples in batches:
        loss, timesteps = torch.tensor([loss for loss, _ in samples]), torch.tensor([t for _, t in samples])
        mask = agc.keep_mask(loss, timesteps)
        agc.update(loss, timesteps)
        for (value, t), kept in zip(samples, mask.tolist(), strict=True):
            weights = [decay**age for age in range(len(before[t]))][::-1]
            sums = math.fsum(weight * old for weight, old in zip(weights, before[t], strict=True))
            usual = sums / sum(weights) if weights else 0.0
            if abs(value - threshold * usual) > 1e-3:
                assert kept == (value >= threshold * usual)
        for value, t in samples:
            before[t].append(value)


@given(batch, st.booleans())
def test_the_first_loss_of_a_timestep_is_always_kept(samples, bias_correction):
    agc = AntiGradientControl(T, threshold=0.99, bias_correction=bias_correction)
    assert agc.keep_mask(torch.tensor([loss for loss, _ in samples]), torch.tensor([t for _, t in samples])).all()


def test_a_sample_far_below_its_timesteps_usual_loss_gives_no_gradient():
    agc = AntiGradientControl(T, threshold=0.8, decay=0.0)
    agc.update(torch.tensor([1.0, 10.0]), torch.tensor([2, 3]))
    loss = torch.tensor([0.79, 0.81, 0.5], requires_grad=True)
    result = agc(loss, torch.tensor([2, 2, 4]))
    result.backward()
    assert result.item() == pytest.approx((0.81 + 0.5) / 2)
    assert loss.grad.tolist() == pytest.approx([0.0, 0.5, 0.5])


def test_skipped_samples_enter_the_bank_too():
    agc = AntiGradientControl(T, threshold=0.8, decay=0.5)
    agc.bank[1] = 8.0
    agc(torch.tensor([2.0]), torch.tensor([1]))
    assert agc.bank[1].item() == 5.0


def test_a_batch_of_which_nothing_is_kept_has_loss_and_gradient_zero():
    agc = AntiGradientControl(T, threshold=0.9)
    agc.bank.fill_(100.0)
    loss = torch.tensor([1.0, 2.0], requires_grad=True)
    result = agc(loss, torch.tensor([0, 1]))
    result.backward()
    assert result.item() == 0.0
    assert loss.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_never_enters_the_bank(bad):
    agc, without = AntiGradientControl(T), AntiGradientControl(T)
    agc.update(torch.tensor([1.0, bad, 3.0]), torch.tensor([2, 2, 2]))
    without.update(torch.tensor([1.0, 3.0]), torch.tensor([2, 2]))
    assert torch.equal(agc.bank, without.bank)
    assert torch.equal(agc.count, without.count)


def test_threshold_zero_keeps_every_finite_sample():
    agc = AntiGradientControl(T, threshold=0.0)
    agc.bank.fill_(1e9)
    assert agc.keep_mask(torch.zeros(3), torch.tensor([0, 1, 2])).all()


@given(st.lists(losses, min_size=1, max_size=10), st.floats(0.0, 0.99))
def test_the_expected_loss_is_the_weighted_mean_of_what_has_entered(values, decay):
    agc = AntiGradientControl(T, decay=decay)
    for value in values:
        agc.update(torch.tensor([value]), torch.tensor([0]))
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert agc.expected_loss(torch.tensor([0])).item() == pytest.approx(mean, rel=1e-3, abs=1e-5)
    assert agc.expected_loss(torch.tensor([1])).isnan().all()


def test_the_state_survives_saving_and_loading():
    agc, copy = AntiGradientControl(T), AntiGradientControl(T)
    agc.update(torch.tensor([1.0, 2.0]), torch.tensor([0, 5]))
    copy.load_state_dict(agc.state_dict())
    assert torch.equal(copy.bank, agc.bank)
    assert torch.equal(copy.count, agc.count)


@pytest.mark.parametrize("settings", [{"threshold": 1.0}, {"threshold": -0.1}, {"decay": 1.0}, {"decay": -0.1}])
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AntiGradientControl(T, **settings)


class Operators(TorchDispatchMode):
    """The names of the operators that are called inside, without those that only look at memory in another way."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view:
            self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def test_the_decision_takes_three_operators_and_none_reads_the_device():
    agc = AntiGradientControl(T)
    loss, timesteps = torch.rand(8), torch.randint(0, T, (8,))
    with Operators() as of_decision:
        agc.keep_mask(loss, timesteps)
    with Operators() as of_update:
        agc.update(loss, timesteps)
    assert len(of_decision.names) == 3
    assert len(of_update.names) <= 20
    assert not {*of_decision.names, *of_update.names} & {"_local_scalar_dense", "nonzero", "item"}
