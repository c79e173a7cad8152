"""PixArt sees the text and the resolution as its own pipelines do, and learns to predict the noise."""

import numpy as np
import pytest
import torch
from families.flows import random_pair
from tiny import RESOLUTION
from tiny_families import T5_WIDTH, tiny_pipeline
from torch.nn import functional

from iet_finetune import Config
from iet_finetune.families.pixart import PixArt
from iet_finetune.method.objective import per_sample_loss

CAPTIONS = ["A Thing ", "", "another, much longer thing that is cut off"]


def family(name: str = "pixart alpha", **flags) -> PixArt:
    return PixArt(tiny_pipeline(name), Config.from_flags(resolution=RESOLUTION, **flags))


@pytest.mark.parametrize(("name", "length"), [("pixart alpha", 120), ("pixart sigma", 300), ("pixart sigma", 16)])
def test_captions_are_encoded_as_the_pipeline_encodes_prompts(name, length):
    ours = family(name, **({"max_sequence_length": length} if length == 16 else {}))
    told = {"max_sequence_length": length} if length == 16 else {}
    with torch.no_grad():
        states, mask, _, _ = ours.pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, **told)
    conditions = ours.encode_captions(CAPTIONS)
    assert torch.equal(conditions["encoder_hidden_states"], states)
    assert torch.equal(conditions["encoder_attention_mask"], mask)
    assert states.shape == (3, length, T5_WIDTH)
    assert 0 < mask.sum() < mask.numel()


def test_latents_are_scaled_draws_from_the_posterior():
    ours = family()
    pixels = torch.rand(2, 3, RESOLUTION, RESOLUTION) * 2 - 1
    mean, std = ours.encode_images(pixels)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    sample = ours.pipeline.vae.encode(pixels).latent_dist.sample(generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours.latents(mean, std, noise), sample * 0.13025)
    assert mean.shape[1:] == ours.latent_shape(RESOLUTION)


@pytest.mark.parametrize("name", ["pixart alpha", "pixart sigma"])
def test_the_loss_of_a_sample_is_that_of_the_published_objective(name):
    ours = family(name, max_sequence_length=16)
    timesteps, (latents, noise) = torch.tensor([0, 400, 999]), random_pair(1, 3)
    sizes = torch.tensor([[20, 30, 0, 0, RESOLUTION, RESOLUTION]] * 3)
    conditions = ours.encode_captions(CAPTIONS) | ours.details(sizes, sizes[:, 0])
    objective = ours.objective
    with torch.no_grad():
        prediction = ours.predict(objective.add_noise(latents, noise, timesteps), timesteps, conditions)
        states, mask, _, _ = ours.pipeline.encode_prompt(
            CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=16
        )
    loss = per_sample_loss(prediction, objective.target(latents, noise, timesteps))
    # Equation 4 of DDPM with its linear schedule; of the transformer's eight channels four are the noise.
    betas = np.linspace(0.0001, 0.02, 1000)
    told = {"resolution": None, "aspect_ratio": None}
    if name == "pixart alpha":
        told = {"resolution": torch.tensor([[16.0, 16.0]]), "aspect_ratio": torch.tensor([[1.0]])}
    for i, t in enumerate(timesteps.tolist()):
        alpha_bar = float(np.prod(1 - betas[: t + 1]))
        x_t = (alpha_bar**0.5 * latents[i].double() + (1 - alpha_bar) ** 0.5 * noise[i].double()).float()[None]
        with torch.no_grad():
            said = ours.pipeline.transformer(
                x_t,
                timestep=torch.tensor([t]),
                encoder_hidden_states=states[i : i + 1],
                encoder_attention_mask=mask[i : i + 1],
                added_cond_kwargs=told,
            ).sample[0]
        assert said.shape == (8, 8, 8)
        assert loss[i].item() == pytest.approx(functional.mse_loss(said[:4], noise[i]).item(), rel=1e-4)
