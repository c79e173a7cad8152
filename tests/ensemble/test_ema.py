"""The moving average against diffusers' own, and where it must stand still."""

import torch
from diffusers.training_utils import EMAModel

from iet_finetune.ensemble.ema import EMA, START_SHARE

GO, STOP = torch.tensor(0.0), torch.tensor(1.0)


def parameters():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(5, generator=generator)) for name in "ab"}


def move(named, step):
    with torch.no_grad():
        for parameter in named.values():
            parameter.add_(0.1 * step)


def test_it_equals_diffusers_moving_average():
    named = parameters()
    ours, theirs = EMA(named, 0.9), EMAModel(named.values(), decay=0.9)
    for step in range(1, 200):
        move(named, step)
        ours.update(step, GO)
        theirs.step(named.values())
    for average, expected in zip(ours.tensors.values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(average, expected)


def test_a_masked_step_changes_no_bit():
    named = parameters()
    ema = EMA(named, 0.9)
    move(named, 1)
    ema.update(50, GO)
    before = {name: tensor.clone() for name, tensor in ema.tensors.items()}
    move(named, 1)
    ema.update(51, STOP)
    assert all(torch.equal(before[name], ema.tensors[name]) for name in before)


def test_an_average_of_constant_weights_is_the_weights():
    named = parameters()
    ema = EMA(named, 0.9999)
    for step in range(1, 30):
        ema.update(step, GO)
    assert all(torch.equal(named[name], ema.tensors[name]) for name in named)


def test_it_goes_on_from_what_was_read():
    named = parameters()
    one = EMA(named, 0.9)
    move(named, 1)
    one.update(20, GO)
    other = EMA(named, 0.9)
    other.load(one.tensors)
    move(named, 2)
    one.update(21, GO)
    other.update(21, GO)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in named)


def test_the_share_of_the_start_is_the_product_of_the_decays_since_and_stands_still_when_a_step_does():
    named = parameters()
    ema, plain, rule = EMA(named, 0.9, start_share=True), EMA(named, 0.9), EMAModel(named.values(), decay=0.9)
    assert ema.tensors[START_SHARE] == 1
    expected = 1.0
    for step in range(3, 12):
        move(named, step)
        masked = step in (5, 8)
        for average in (ema, plain):
            average.update(step, STOP if masked else GO)
        expected *= 1.0 if masked else rule.get_decay(step)
        torch.testing.assert_close(ema.tensors[START_SHARE].item(), expected, rtol=1e-5, atol=0)
    assert 0 < expected < 0.1
    # The number beside them changes nothing of the averages.
    assert set(ema.tensors) == {*plain.tensors, START_SHARE}
    assert all(torch.equal(ema.tensors[name], tensor) for name, tensor in plain.tensors.items())


def test_the_share_of_the_start_goes_on_from_what_was_read():
    named = parameters()
    one, other = EMA(named, 0.9, start_share=True), EMA(named, 0.9, start_share=True)
    one.update(20, GO)
    other.load(one.tensors)
    for ema in (one, other):
        ema.update(21, GO)
    assert torch.equal(one.tensors[START_SHARE], other.tensors[START_SHARE])
    assert one.tensors[START_SHARE] < 0.5
