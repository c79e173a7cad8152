"""The moving average against diffusers' own, and where it must stand still."""

import torch
from diffusers.training_utils import EMAModel

from iet_finetune.ema import EMA

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
