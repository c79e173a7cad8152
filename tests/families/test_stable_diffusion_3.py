"""SD 3 and 3.5 see the text as their own pipeline does, with T5 or without, and learn the published objective."""

import pytest
import torch
from diffusers import DDIMScheduler
from families.flows import cosmap, random_pair, shifted_sigmas
from families.text_to_image import build_world, config
from tiny import RESOLUTION
from tiny_families import T5_WIDTH, WIDTH, tiny_pipeline
from torch.nn import functional

from iet_finetune import Config, Trainer, UserError
from iet_finetune.families.stable_diffusion_3 import StableDiffusion3
from iet_finetune.method.objective import per_sample_loss

CAPTIONS = ["a thing", "", "another, much longer thing that is cut off"]
NAMES = ("sd3", "sd3 without t5", "sd35")


def family(name: str = "sd3", **flags) -> StableDiffusion3:
    return StableDiffusion3(tiny_pipeline(name), Config.from_flags(**flags))


@pytest.mark.parametrize("length", [None, 16])
@pytest.mark.parametrize("name", NAMES[:2])
def test_captions_are_encoded_as_the_pipeline_encodes_prompts(name, length):
    ours = family(name, max_sequence_length=length)
    told = {} if length is None else {"max_sequence_length": length}
    with torch.no_grad():
        states, _, pooled, _ = ours.pipeline.encode_prompt(
            CAPTIONS, None, None, device="cpu", do_classifier_free_guidance=False, **told
        )
    conditions = ours.encode_captions(CAPTIONS)
    assert torch.equal(conditions["encoder_hidden_states"], states)
    assert torch.equal(conditions["pooled_projections"], pooled)
    assert states.shape == (3, 12 + (length or 256), T5_WIDTH)


def test_clip_states_are_concatenated_and_precede_t5():
    ours = family(max_sequence_length=16)
    pipeline, states = ours.pipeline, ours.encode_captions(["a thing"])["encoder_hidden_states"]
    ids = [
        one(["a thing"], padding="max_length", max_length=length, return_tensors="pt").input_ids
        for one, length in ((pipeline.tokenizer, 12), (pipeline.tokenizer_2, 12), (pipeline.tokenizer_3, 16))
    ]
    with torch.no_grad():
        first = pipeline.text_encoder(ids[0], output_hidden_states=True).hidden_states[1]
        second = pipeline.text_encoder_2(ids[1], output_hidden_states=True).hidden_states[2]
        t5 = pipeline.text_encoder_3(ids[2]).last_hidden_state
    assert torch.equal(states[:, :12, :WIDTH], first)
    assert torch.equal(states[:, :12, WIDTH : 2 * WIDTH], second)
    assert not states[:, :12, 2 * WIDTH :].any()
    assert torch.equal(states[:, 12:], t5)
    without = family("sd3 without t5", max_sequence_length=16).encode_captions(["a thing"])["encoder_hidden_states"]
    assert without.shape == states.shape
    assert not without[:, 12:].any()


def test_latents_are_what_the_pipeline_decodes():
    ours = family()
    pixels = torch.rand(2, 3, RESOLUTION, RESOLUTION) * 2 - 1
    mean, std = ours.encode_images(pixels)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    sample = ours.pipeline.vae.encode(pixels).latent_dist.sample(generator=torch.Generator().manual_seed(3))
    # The pipeline's last step: latents / scaling_factor + shift_factor.
    torch.testing.assert_close(ours.latents(mean, std, noise) / 1.5 + 0.06, sample)
    assert mean.shape[1:] == ours.latent_shape(RESOLUTION)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_a_sample_is_that_of_the_published_objective(name):
    ours = family(name, max_sequence_length=16, weighting_scheme="cosmap")
    timesteps, (latents, noise) = torch.tensor([0, 300, 999]), random_pair(1, 3)
    objective, conditions = ours.objective, ours.encode_captions(CAPTIONS)
    with torch.no_grad():
        prediction = ours.predict(objective.add_noise(latents, noise, timesteps), timesteps, conditions)
        states, _, pooled, _ = ours.pipeline.encode_prompt(
            CAPTIONS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=16
        )
    loss = per_sample_loss(prediction, objective.target(latents, noise, timesteps))
    weighted = loss * objective.loss_weights(timesteps, None)
    sigmas = shifted_sigmas(3.0)
    # Sections 2 and 3 of "Scaling Rectified Flow Transformers": z = (1 - σ) x + σ ε, the velocity is ε - x.
    for i, t in enumerate(timesteps.tolist()):
        sigma = float(sigmas[t])
        z = ((1 - sigma) * latents[i].double() + sigma * noise[i].double()).float()[None]
        with torch.no_grad():
            said = ours.pipeline.transformer(
                hidden_states=z,
                timestep=torch.tensor([1000 * sigma], dtype=torch.float32),
                encoder_hidden_states=states[i : i + 1],
                pooled_projections=pooled[i : i + 1],
            ).sample[0]
        wanted = functional.mse_loss(said, noise[i] - latents[i]).item()
        assert loss[i].item() == pytest.approx(wanted, rel=1e-4)
        assert weighted[i].item() == pytest.approx(wanted * cosmap(sigma), rel=1e-4)


def test_noise_levels_are_drawn_from_the_logit_normal_distribution_unless_the_user_says_otherwise():
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = family().objective.sample_timesteps(uniform)
    # Between the quartiles of N(0, 1) lies half of all: logit(v) in ±0.6745, so v in (0.3375, 0.6625).
    assert ((ours >= 337) & (ours < 663)).double().mean().item() == pytest.approx(0.5, abs=0.01)
    plain = family(weighting_scheme="none").objective.sample_timesteps(uniform)
    assert ((plain >= 337) & (plain < 663)).double().mean().item() == pytest.approx(0.326, abs=0.01)


def test_drawing_leaves_the_noise_levels_of_training_alone():
    pipeline = tiny_pipeline("sd3")
    pipeline("a thing", height=RESOLUTION, width=RESOLUTION, num_inference_steps=2, output_type="latent")
    assert len(pipeline.scheduler.sigmas) == 3
    objective = StableDiffusion3(pipeline).objective
    torch.testing.assert_close(objective.sigmas, torch.from_numpy(shifted_sigmas(3.0)).float())


def test_another_kind_of_scheduler_is_refused():
    pipeline = tiny_pipeline("sd3")
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(
        UserError, match="the pipeline's scheduler is a DDIMScheduler.*FlowMatchEulerDiscreteScheduler"
    ):
        StableDiffusion3(pipeline)


@pytest.mark.parametrize("bins", [None, 7])
def test_the_loss_bank_is_indexed_by_the_noise_level(tmp_path, bins):
    world = build_world(tmp_path, "sd3")
    flags = {"agc_bins": bins, "num_shards": 1, "validation_prompts": []}
    trainer = Trainer(config(world, tmp_path / "out", **flags))
    ours, predict, drawn = trainer.model.family, trainer.model.family.predict, []
    ours.predict = lambda noisy, timesteps, conditions: (
        drawn.extend(timesteps.tolist()) or predict(noisy, timesteps, conditions)
    )
    trainer.train_rounds()
    (clone,) = trainer.ensemble.clones
    count = bins or 100
    assert len(clone.rule.agc.bank) == count
    # floor(σ · bins), and the last bin for σ = 1.
    visited = {min(int(shifted_sigmas(3.0)[t] * count), count - 1) for t in drawn}
    assert len(drawn) == 16
    assert set(clone.rule.agc.bank.nonzero().flatten().tolist()) == visited
