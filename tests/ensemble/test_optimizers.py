"""Learning rates, and the step that a mask on the device holds back."""

import pytest
import torch
from diffusers.optimization import get_scheduler

from iet_finetune.config.settings import SCHEDULES, OptimizerConfig, TrainingConfig
from iet_finetune.ensemble.optimizers import (
    build_optimizer,
    fresh_optimizer_state,
    learning_rate_schedule,
    load_optimizer_state,
    masked_step,
    named_state,
    optimizer_state,
    parameter_of,
    state_by_parameter,
)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_of_a_step_is_that_of_diffusers_scheduler(name):
    course = learning_rate_schedule(OptimizerConfig(lr_scheduler=name, lr_warmup_steps=5), 40, 2e-3)
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=2e-3)
    scheduler = get_scheduler(name, stand_in, num_warmup_steps=5, num_training_steps=40)
    for step in range(40):
        assert course(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        stand_in.step()
        scheduler.step()


def test_scale_lr_multiplies_by_the_samples_of_a_step():
    training = TrainingConfig(train_batch_size=4, gradient_accumulation_steps=3)
    optimizer = build_optimizer([torch.nn.Parameter(torch.ones(1))], OptimizerConfig(scale_lr=True), training)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * 12)


@pytest.mark.parametrize("fused", [True, False])
def test_a_masked_step_changes_neither_weights_nor_optimizer_state(fused):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)

    def step(masked):
        parameter.grad = torch.tensor([1.0, float("nan") if masked else 2.0, 3.0])
        masked_step(optimizer, torch.tensor(float(masked)))

    step(False)
    weights = parameter.detach().clone()
    moments = {name: value.clone() for name, value in optimizer.state[parameter].items()}
    step(True)
    assert torch.equal(parameter, weights)
    assert all(torch.equal(value, moments[name]) for name, value in optimizer.state[parameter].items())
    step(False)
    assert not torch.equal(parameter, weights)


def test_a_fresh_state_is_that_of_an_optimizer_that_has_not_stepped_yet():
    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(5)]
    results = []
    for fresh in (False, True):
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
        if fresh:
            named = named_state(fresh_optimizer_state(optimizer))
            assert set(named) == {f"{i}.{name}" for i in (0, 1) for name in ("step", "exp_avg", "exp_avg_sq")}
            state = {**optimizer.state_dict(), "state": state_by_parameter(named)}
            optimizer.load_state_dict(state)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        results.append([*parameters, *named_state(optimizer.state_dict()["state"]).values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_name_in_the_state_tells_the_parameter():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(12)]
    names = list(named_state(fresh_optimizer_state(torch.optim.AdamW(parameters))))
    assert [parameter_of(name) for name in names] == [number for number in range(12) for _ in range(3)]


@pytest.mark.parametrize("fused", [True, False])
def test_a_parameter_whose_state_was_dropped_starts_anew_and_the_other_goes_on(fused):
    def two():
        parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))]
        return parameters, torch.optim.AdamW(parameters, lr=0.1, fused=fused)

    def step(optimizer, parameters, gradient):
        for parameter in parameters:
            parameter.grad = torch.tensor(gradient)
        optimizer.step()

    (kept, dropped), optimizer = two()
    (whole, _), of_whole = two()
    (_, fresh), of_fresh = two()
    step(optimizer, [kept, dropped], [1.0, -2.0, 3.0])
    step(of_whole, [whole], [1.0, -2.0, 3.0])
    fresh.data.copy_(dropped)
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "state": {0: state["state"][0]}})
    step(optimizer, [kept, dropped], [0.5, 1.0, -7.0])
    step(of_whole, [whole], [0.5, 1.0, -7.0])
    step(of_fresh, [fresh], [0.5, 1.0, -7.0])
    assert torch.equal(kept, whole)
    assert torch.equal(dropped, fresh)
    assert not torch.equal(kept, dropped)


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_that_is_loaded_is_worked_in_and_gives_the_steps_of_an_optimizer_that_went_on(fused):
    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(5), torch.randn(2)]
    gradients = [[torch.randn_like(value) for value in start] for _ in range(6)]

    def made():
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        return parameters, torch.optim.AdamW(parameters, lr=0.1, fused=fused)

    def take(parameters, optimizer, steps):
        for step in steps:
            # The last parameter is first trained in step 3.
            for parameter, gradient in list(zip(parameters, gradients[step], strict=True))[: 3 if step > 2 else 2]:
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad()

    whole, without_stop = made()
    take(whole, without_stop, range(6))
    parameters, optimizer = made()
    take(parameters, optimizer, range(2))
    moments = optimizer_state(optimizer)
    assert moments.keys() == optimizer.state_dict()["state"].keys() == {0, 1}
    load_optimizer_state(optimizer, None)
    assert optimizer_state(optimizer) == {}
    load_optimizer_state(optimizer, moments)
    take(parameters, optimizer, range(2, 6))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, whole, strict=True))
    for index, values in moments.items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert optimizer_state(optimizer)[index][name].data_ptr() == values[name].data_ptr(), "copied"
