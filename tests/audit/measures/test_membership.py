"""Membership inference sees the loss that training saw, and tells images that are known by heart from others."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from families.pixels import tiny_pixels
from tiny import RESOLUTION, tiny_sd
from tiny_families import tiny_pipeline

from iet_finetune import Config
from iet_finetune.audit.measures.membership import (
    calibrated_scores,
    fixed_draws,
    image_losses,
    loss_findings,
    membership_by_repeats,
    membership_findings,
    raw_scores,
    spread_draws,
)
from iet_finetune.audit.measures.separation import auc
from iet_finetune.families.flux import Flux
from iet_finetune.families.pixart import PixArt
from iet_finetune.families.stable_diffusion import StableDiffusion
from iet_finetune.families.stable_diffusion_3 import StableDiffusion3
from iet_finetune.families.stable_diffusion_xl import StableDiffusionXL
from iet_finetune.families.unconditional import Unconditional
from iet_finetune.method.objective import FlowMatching, NoiseSchedule

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
CAPTIONS = ["thing 0", "", "a much longer thing that is cut off", "thing 3"]
SIZES = torch.tensor([[16, 16, 0, 0, 16, 16], [64, 32, 0, 8, 16, 16], [20, 20, 2, 2, 16, 16], [99, 16, 40, 0, 16, 16]])
LABELS = torch.tensor([0, 1, 2, 1])
FAMILIES = {
    "sd": (StableDiffusion, tiny_sd),
    "sd v": (StableDiffusion, lambda: tiny_sd("v_prediction")),
    "sdxl": (StableDiffusionXL, lambda: tiny_pipeline("sdxl")),
    "sd3": (StableDiffusion3, lambda: tiny_pipeline("sd3")),
    "pixart alpha": (PixArt, lambda: tiny_pipeline("pixart alpha")),
    "pixart sigma": (PixArt, lambda: tiny_pipeline("pixart sigma")),
    "flux dev": (Flux, lambda: tiny_pipeline("flux dev")),
    "flux schnell": (Flux, lambda: tiny_pipeline("flux schnell")),
    "pixels": (Unconditional, lambda: tiny_pixels(timesteps=1000)),
    "classes": (Unconditional, lambda: tiny_pixels(timesteps=1000, num_class_embeds=3)),
}


def make_family(name, **flags):
    kind, pipeline = FAMILIES[name]
    family = kind(pipeline(), Config.from_flags(resolution=RESOLUTION, **flags))
    family.place(CPU)
    return family


def random_pixels(count, seed=0):
    squares = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return squares.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def losses_of(family, pixels, draws, order=slice(None)):
    captions = np.array(CAPTIONS)[order].tolist()
    return image_losses(family, pixels[order], captions, SIZES[order], LABELS[order], draws, CPU)


# Draws


def test_noise_levels_are_the_middles_of_equal_parts_of_a_noise_schedule():
    draws = fixed_draws(NoiseSchedule(DDPMScheduler().alphas_cumprod), SHAPE, count=10, low=0.05, high=0.30)
    # The middles are 62.5, 87.5, ... of 1,000 steps; either neighbour is as near.
    assert (draws.timesteps - torch.arange(62.5, 300, 25)).abs().max() <= 0.5
    assert draws.levels == pytest.approx((draws.timesteps / 1000).tolist(), abs=1e-3)
    assert draws.timesteps.dtype == torch.int64
    assert draws.noise.shape == (10, *SHAPE)
    assert draws.noise.dtype == torch.float32


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_of_flow_matching_are_sigmas(shift):
    sigmas = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas
    draws = fixed_draws(FlowMatching(sigmas), SHAPE)
    wanted = [0.05 + 0.25 * (j + 0.5) / 8 for j in range(8)]
    assert sigmas[draws.timesteps].tolist() == pytest.approx(wanted, abs=0.002)
    assert draws.levels == pytest.approx(sigmas[draws.timesteps].tolist(), abs=1e-5)
    # Little noise is at the end of the sigmas, which fall.
    assert draws.timesteps.tolist() == sorted(draws.timesteps.tolist(), reverse=True)


@pytest.mark.parametrize(
    "objective",
    [NoiseSchedule(DDPMScheduler().alphas_cumprod), FlowMatching(FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas)],
    ids=["noise schedule", "flow matching"],
)
def test_images_get_noisier_from_draw_to_draw_and_only_spread_draws_reach_nearly_pure_noise(objective):
    latents = torch.full((8, *SHAPE), 3.0)
    for draws, least, most in ((fixed_draws(objective, SHAPE), 0.2, 0.8), (spread_draws(objective, SHAPE), 0.9, 1.0)):
        noisy = objective.add_noise(latents, draws.noise[:1].expand_as(latents), draws.timesteps)
        noisiness = noisy.std(dim=(1, 2, 3)) / draws.noise[0].std()
        assert (noisiness.diff() > 0).all()
        assert least < noisiness[-1] < most + 1e-4
        assert list(draws.levels) == sorted(draws.levels)
        assert 0 < draws.levels[0] < draws.levels[-1] < 1


def test_noise_follows_from_the_seed_alone_and_leaves_torch_alone():
    objective = NoiseSchedule(DDPMScheduler().alphas_cumprod)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = fixed_draws(objective, SHAPE, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(fixed_draws(objective, SHAPE, seed=5).noise, first.noise)
    assert torch.equal(fixed_draws(objective, SHAPE, count=12, seed=5).noise[:8], first.noise)
    assert not torch.equal(fixed_draws(objective, SHAPE, seed=6).noise, first.noise)
    assert first.noise.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.3
    assert abs(fixed_draws(objective, (4, 64, 64)).noise.std().item() - 1) < 0.01


def test_membership_inference_takes_at_least_eight_draws():
    objective = NoiseSchedule(DDPMScheduler().alphas_cumprod)
    with pytest.raises(ValueError, match="at least 8 draws, not 7"):
        fixed_draws(objective, SHAPE, count=7)
    assert len(spread_draws(objective, SHAPE, count=1).levels) == 1


# Losses


def reference_noise(family, latents, noise, index):
    """Noisy latents and target by diffusers' schedulers."""
    scheduler = family.pipeline.scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        return scheduler.scale_noise(latents, scheduler.timesteps[index : index + 1], noise), noise - latents
    scheduler = DDPMScheduler.from_config(scheduler.config)
    timesteps = torch.tensor([index])
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    return scheduler.add_noise(latents, noise, timesteps), target


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_losses_are_those_of_one_image_and_one_draw_at_a_time(name):
    family, pixels = make_family(name), random_pixels(4)
    draws = fixed_draws(family.objective, family.latent_shape(RESOLUTION))
    losses = losses_of(family, pixels, draws)
    assert losses.shape == (4, 8)
    assert losses.dtype == torch.float32
    for i in range(4):
        latents = pixels[i : i + 1]
        if "vae" in family.pipeline.components:
            vae = family.pipeline.vae
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            latents = (vae.encode(latents).latent_dist.mean - shift) * vae.config.scaling_factor
        conditions = family.encode_captions([CAPTIONS[i]]) | family.details(SIZES[i : i + 1], LABELS[i : i + 1])
        for j in (0, 5):
            index = int(draws.timesteps[j])
            noisy, target = reference_noise(family, latents, draws.noise[j : j + 1], index)
            prediction = family.predict(noisy, torch.tensor([index]), conditions)
            loss = float(((prediction.double() - target.double()) ** 2).mean())
            assert losses[i, j].item() == pytest.approx(loss, rel=2e-4)


@torch.no_grad()
def test_the_loss_under_stable_diffusion_is_that_of_its_own_parts():
    family, pixels = make_family("sd"), random_pixels(4)
    pipeline, draws = family.pipeline, fixed_draws(family.objective, SHAPE)
    losses = losses_of(family, pixels, draws)
    states, _ = pipeline.encode_prompt(CAPTIONS, CPU, 1, do_classifier_free_guidance=False)
    latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    for j, t in enumerate(draws.timesteps.tolist()):
        alpha_bar = float(pipeline.scheduler.alphas_cumprod[t])
        noisy = alpha_bar**0.5 * latents + (1 - alpha_bar) ** 0.5 * draws.noise[j]
        loss = (pipeline.unet(noisy, t, states).sample - draws.noise[j]).square().mean(dim=(1, 2, 3))
        assert losses[:, j].tolist() == pytest.approx(loss.tolist(), rel=1e-4)


@pytest.mark.parametrize("name", ["sd", "sd3", "pixels"])
def test_a_loss_does_not_depend_on_the_other_images_of_its_batch(name):
    family, pixels = make_family(name), random_pixels(4)
    draws = fixed_draws(family.objective, family.latent_shape(RESOLUTION))
    whole = losses_of(family, pixels, draws)
    padded = losses_of(family, pixels, draws, [2, 1, 1, 1])
    assert torch.equal(padded, whole[[2, 1, 1, 1]])
    assert torch.allclose(losses_of(family, pixels, draws, [3]), whole[3:], rtol=1e-4)


def test_losses_are_without_dropout_gradients_and_chance():
    kind, _ = FAMILIES["sd"]
    family = kind(tiny_sd(dropout=0.5), Config.from_flags(resolution=RESOLUTION))
    family.place(CPU)
    family.denoiser.train()
    draws = fixed_draws(family.objective, SHAPE)
    before = torch.get_rng_state()
    losses = losses_of(family, random_pixels(4), draws)
    assert torch.equal(torch.get_rng_state(), before)
    assert family.denoiser.training
    assert not losses.requires_grad
    family.denoiser.eval()
    assert torch.equal(losses_of(family, random_pixels(4), draws), losses)


def test_under_autocast_the_denoiser_works_in_half_precision_and_the_encoders_in_fp32():
    family, pixels = make_family("sd"), random_pixels(4)
    draws, seen = fixed_draws(family.objective, SHAPE), {}
    family.pipeline.vae.quant_conv.register_forward_hook(lambda *call: seen.update(vae=call[-1].dtype))
    family.pipeline.unet.conv_out.register_forward_hook(lambda *call: seen.update(unet=call[-1].dtype))
    exact = losses_of(family, pixels, draws)
    with torch.autocast("cpu", torch.bfloat16):
        half = losses_of(family, pixels, draws)
    assert seen == {"vae": torch.float32, "unet": torch.bfloat16}
    assert half.dtype == torch.float32
    assert torch.allclose(half, exact, rtol=0.02)


# From losses to scores


def test_scores_are_mean_logarithms():
    rng = np.random.default_rng(0)
    losses, reference = rng.random((2, 5, 8)).astype(np.float32)
    for i in range(5):
        raw = -sum(np.log(float(x)) for x in losses[i]) / 8
        difference = sum(np.log(float(y)) - np.log(float(x)) for x, y in zip(losses[i], reference[i], strict=True)) / 8
        assert raw_scores(losses)[i] == pytest.approx(raw)
        assert calibrated_scores(losses, reference)[i] == pytest.approx(difference)
    # Twice as hard at one noise level changes no difference between images.
    harder = losses * np.array([10.0] + [1.0] * 7, dtype=np.float32)
    assert np.diff(raw_scores(harder)) == pytest.approx(np.diff(raw_scores(losses)))


def test_a_loss_of_zero_gives_the_highest_finite_score():
    losses = np.array([[0.0] * 8, [1e-30] * 8, [0.1] * 8], dtype=np.float32)
    scores = raw_scores(losses)
    assert np.isfinite(scores).all()
    assert scores[0] > scores[1] > scores[2]
    assert calibrated_scores(losses[:1], losses[:1]).tolist() == [0.0]


class Ideal:
    """The denoiser with the least loss on data that is these images alone, or else on independent normal pixels.

    E[epsilon | x_t] = (x_t - sqrt(a) E[x_0 | x_t]) / sqrt(1 - a), where x_0 is a mean of the images, weighted by
    how likely each of them became x_t.
    """

    def __init__(self, schedule, images=None, spread=1.0):
        self.schedule, self.images, self.spread = schedule, images, spread

    def __call__(self, noisy, timesteps, return_dict=False):
        a = self.schedule.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        if self.images is None:
            clean = a.sqrt() * self.spread / (a * self.spread + 1 - a) * noisy
        else:
            distances = (noisy[:, None] - a[:, None].sqrt() * self.images[None]).square().flatten(2).sum(dim=2)
            weights = (-distances / (2 * (1 - a.flatten()[:, None]))).softmax(dim=1)
            clean = torch.einsum("bn,nchw->bchw", weights, self.images)
        return ((noisy - a.sqrt() * clean) / (1 - a).sqrt(),)


def pixel_losses(network, images, draws):
    family = make_family("pixels")
    family.network = network
    count = len(images)
    empty = torch.zeros(count, 4, dtype=torch.int64)
    return image_losses(family, images, [""] * count, empty, empty[:, 0], draws, CPU).numpy()


def known_and_unknown(count=60):
    images = random_pixels(2 * count, seed=3)
    # Images of different contrast are differently hard.
    images = images * torch.linspace(0.2, 1.0, count).repeat(2)[:, None, None, None]
    return images[:count], images[count:]


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule(DDPMScheduler().alphas_cumprod)


def test_a_model_that_knows_its_images_by_heart_gives_them_away(schedule):
    known, unknown = known_and_unknown()
    draws = fixed_draws(schedule, (3, RESOLUTION, RESOLUTION))
    train, heldout = (pixel_losses(Ideal(schedule, known), images, draws) for images in (known, unknown))
    findings, rows = membership_findings(train, heldout, draws.levels)
    assert findings.metrics["mia_auc"].value > 0.99
    assert findings.metrics["mia_tpr_at_1_fpr"].value > 0.9
    assert [row.metrics["mia_auc"].value > 0.99 for row in rows] == [True] * 8
    lost = loss_findings(heldout, train).metrics["heldout_loss"]
    assert lost.value > lost.baseline


def test_a_model_that_has_not_seen_the_images_gives_nothing_away(schedule):
    known, unknown = known_and_unknown(200)
    draws = fixed_draws(schedule, (3, RESOLUTION, RESOLUTION))
    train, heldout = (pixel_losses(Ideal(schedule, spread=0.3), images, draws) for images in (known, unknown))
    area = membership_findings(train, heldout, draws.levels)[0].metrics["mia_auc"]
    assert area.low < 0.5 < area.high
    assert abs(area.value - 0.5) < 0.08


def test_a_reference_model_shows_what_the_difficulty_of_the_images_hides(schedule):
    known, unknown = known_and_unknown()
    draws = fixed_draws(schedule, (3, RESOLUTION, RESOLUTION))
    reference = Ideal(schedule, spread=0.3)

    def slightly_fitted(noisy, timesteps, return_dict=False):
        plain, fitted = reference(noisy, timesteps)[0], Ideal(schedule, known)(noisy, timesteps)[0]
        near = (fitted - plain).square().mean(dim=(1, 2, 3), keepdim=True) < 0.5
        return (torch.where(near, 0.95 * plain + 0.05 * fitted, plain),)

    ours, theirs = (
        [pixel_losses(network, images, draws) for images in (known, unknown)]
        for network in (slightly_fitted, reference)
    )
    findings, rows = membership_findings(ours[0], ours[1], draws.levels, theirs[0], theirs[1])
    assert findings.metrics["mia_auc"].value < 0.65
    assert findings.metrics["mia_ref_auc"].value > 0.9
    assert findings.metrics["mia_ref_auc"].value == auc(
        calibrated_scores(ours[0], theirs[0]), calibrated_scores(ours[1], theirs[1])
    )
    assert max(row.metrics["mia_ref_auc"].value for row in rows) > 0.9


# Findings


def random_losses(count, seed, shift=0.0):
    noise = np.random.default_rng(seed).normal(size=(count, 8))
    return np.exp(noise - shift - np.arange(8) / 4).astype(np.float32)


def test_metrics_stand_beside_what_chance_gives_and_one_row_a_noise_level():
    train, heldout, levels = random_losses(150, 0, shift=0.5), random_losses(120, 1), np.linspace(0.29, 0.06, 8)
    findings, rows = membership_findings(train, heldout, levels.tolist(), seed=4)
    area, rate = findings.metrics["mia_auc"], findings.metrics["mia_tpr_at_1_fpr"]
    assert area.value == auc(raw_scores(train), raw_scores(heldout))
    assert (area.baseline, rate.baseline) == (0.5, 2 / 121)
    assert 0.5 < area.low < area.value < area.high < 1
    assert findings.not_measured == dict.fromkeys(("mia_ref_auc", "mia_ref_tpr_at_1_fpr"), "needs `--reference_model`")
    assert findings.warnings == []
    drawn = findings.histograms["mia"].series
    assert (sum(drawn["training"]), sum(drawn["heldout"])) == (150, 120)
    assert [row.level for row in rows] == pytest.approx(sorted(levels), abs=1e-4)
    # The last draw has the least noise here.
    assert rows[0].metrics["mia_auc"].value == auc(-train[:, 7], -heldout[:, 7])
    assert all(row.metrics.keys() == {"mia_auc"} for row in rows)


def test_few_images_are_warned_of():
    levels = [0.1] * 8
    warnings = membership_findings(random_losses(29, 0), random_losses(60, 1), levels)[0].warnings
    assert len(warnings) == 2
    assert "1 % of 60 held-out images is less than one" in warnings[0]
    assert "only 29 training images" in warnings[1]
    reference = random_losses(40, 2), random_losses(12, 3)
    warnings = membership_findings(random_losses(40, 0), random_losses(12, 1), levels, *reference)[0].warnings
    assert len(warnings) == 2
    assert "only 12 held-out images" in warnings[1]


def test_losses_that_are_not_finite_or_not_there_are_not_measured():
    train, heldout, levels = random_losses(40, 0), random_losses(40, 1), [0.1] * 8
    broken = train.copy()
    broken[3, 2], broken[5, 5] = np.nan, np.inf
    findings, rows = membership_findings(broken, heldout, levels)
    assert findings.metrics == {}
    assert findings.not_measured["mia_tpr_at_1_fpr"] == "2 of 640 losses are not finite"
    assert rows == []
    findings, rows = membership_findings(train, heldout, levels, broken, heldout)
    assert findings.metrics.keys() == {"mia_auc", "mia_tpr_at_1_fpr"}
    assert findings.not_measured["mia_ref_auc"] == "2 of 1280 losses are not finite"
    assert all(row.metrics.keys() == {"mia_auc"} for row in rows)
    assert "--holdout_fraction" in membership_findings(train, heldout[:0], levels)[0].not_measured["mia_auc"]
    assert "no training images" in membership_findings(train[:0], heldout, levels)[0].not_measured["mia_auc"]


def test_images_that_are_repeated_are_compared_with_all_held_out_ones_class_by_class():
    repeats = np.array([1, 1, 2, 4, 5, 9, 10, 40, 3, 1])
    train = np.random.default_rng(0).normal(size=10) + repeats / 10
    heldout = np.random.default_rng(1).normal(size=30)
    found = membership_by_repeats(train, repeats, heldout)
    assert {label: metric.value for label, metric in found.items()} == {
        "1": auc(train[[0, 1, 9]], heldout),
        "2-4": auc(train[[2, 3, 8]], heldout),
        "5-9": auc(train[[4, 5]], heldout),
        "10 or more": auc(train[[6, 7]], heldout),
    }
    assert membership_by_repeats(train, np.ones(10, dtype=np.int64), heldout).keys() == {"1"}
    assert membership_by_repeats(train, repeats, heldout[:0]) == {}
    assert membership_by_repeats(np.full(10, np.nan), repeats, heldout) == {}


def test_the_held_out_loss_stands_beside_that_of_the_training_images():
    train, heldout = random_losses(50, 0, shift=1.0), random_losses(40, 1)
    loss = loss_findings(heldout, train).metrics["heldout_loss"]
    assert loss.value == pytest.approx(float(np.mean([np.mean(row) for row in heldout.astype(float)])))
    assert loss.baseline == pytest.approx(float(train.astype(float).mean()))
    assert loss.low < loss.value < loss.high
    assert loss_findings(heldout).metrics["heldout_loss"].baseline is None
    assert "--holdout_data_dir" in loss_findings(heldout[:0], train).not_measured["heldout_loss"]
    train[0, 0] = np.nan
    assert loss_findings(heldout, train).not_measured == {"heldout_loss": "1 of 720 losses are not finite"}
