"""Noise, targets and loss weights against diffusers' scheduler and against the formulas in numpy."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from iet_finetune import NoiseSchedule, per_sample_loss


@pytest.fixture(params=["scaled_linear", "squaredcos_cap_v2"])
def scheduler(request):
    return DDPMScheduler(beta_schedule=request.param, beta_start=0.00085, beta_end=0.012)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(5, 4, 3, 3, generator=generator) for _ in range(2))
    return latents, noise, torch.tensor([0, 1, 500, 998, 999])


def test_noise_and_velocity_are_those_of_diffusers_scheduler(scheduler, batch):
    latents, noise, timesteps = batch
    schedule = NoiseSchedule(scheduler.alphas_cumprod, "v_prediction")
    torch.testing.assert_close(
        schedule.add_noise(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps)
    )
    torch.testing.assert_close(
        schedule.target(latents, noise, timesteps), scheduler.get_velocity(latents, noise, timesteps)
    )
    torch.testing.assert_close(schedule.snr(timesteps), compute_snr(scheduler, timesteps))


def test_the_target_of_epsilon_is_the_noise_and_of_sample_the_latents(scheduler, batch):
    latents, noise, timesteps = batch
    assert NoiseSchedule(scheduler.alphas_cumprod, "epsilon").target(*batch) is noise
    assert NoiseSchedule(scheduler.alphas_cumprod, "sample").target(*batch) is latents


def test_the_loss_of_a_sample_is_the_mean_of_its_squared_errors(batch):
    prediction, target, _ = batch
    expected = ((prediction.double().numpy() - target.double().numpy()) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(per_sample_loss(prediction, target).numpy(), expected, rtol=1e-6)


def test_a_half_precision_prediction_is_compared_in_fp32():
    prediction, target = torch.full((1, 1, 1, 2), 300.0, dtype=torch.float16), torch.zeros(1, 1, 1, 2)
    assert per_sample_loss(prediction, target).item() == 90_000.0


def test_min_snr_weights_follow_the_paper(scheduler):
    timesteps = torch.arange(1000)
    snr = compute_snr(scheduler, timesteps).double()
    clipped = snr.clamp(max=5.0)
    for prediction_type, expected in (
        ("epsilon", clipped / snr),
        ("v_prediction", clipped / (snr + 1)),
        ("sample", clipped),
    ):
        weights = NoiseSchedule(scheduler.alphas_cumprod, prediction_type).min_snr_weights(timesteps, 5.0)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_schedule_that_ends_in_pure_noise_gives_finite_weights(prediction_type):
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    weights = NoiseSchedule(scheduler.alphas_cumprod, prediction_type).min_snr_weights(torch.arange(1000), 5.0)
    assert weights.isfinite().all()


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="flow"):
        NoiseSchedule(torch.ones(3), "flow")
