"""Flux.1 sees text, guidance and packed latents as its own pipeline does, and learns the published objective."""

import pytest
import torch
from families.flows import random_pair, shifted_sigmas
from tiny import RESOLUTION
from tiny_families import T5_WIDTH, WIDTH, tiny_pipeline
from torch.nn import functional

from iet_finetune import Config
from iet_finetune.families.flux import Flux
from iet_finetune.method.objective import per_sample_loss

CAPTIONS = ["a thing", "", "another, much longer thing that is cut off"]


def family(name: str = "flux dev", **flags) -> Flux:
    return Flux(tiny_pipeline(name), Config.from_flags(**flags))


@pytest.mark.parametrize("length", [None, 16])
def test_captions_are_encoded_as_the_pipeline_encodes_prompts(length):
    ours = family(max_sequence_length=length)
    told = {} if length is None else {"max_sequence_length": length}
    with torch.no_grad():
        states, pooled, text_ids = ours.pipeline.encode_prompt(CAPTIONS, device="cpu", **told)
    conditions = ours.encode_captions(CAPTIONS)
    assert torch.equal(conditions["encoder_hidden_states"], states)
    assert torch.equal(conditions["pooled_projections"], pooled)
    assert states.shape == (3, length or 512, T5_WIDTH)
    assert pooled.shape == (3, WIDTH)
    assert not text_ids.any()


def test_latents_are_what_the_pipeline_decodes():
    ours = family()
    pixels = torch.rand(2, 3, RESOLUTION, RESOLUTION) * 2 - 1
    mean, std = ours.encode_images(pixels)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    sample = ours.pipeline.vae.encode(pixels).latent_dist.sample(generator=torch.Generator().manual_seed(3))
    # The pipeline's last step: latents / scaling_factor + shift_factor.
    torch.testing.assert_close(ours.latents(mean, std, noise) / 1.5 + 0.06, sample)
    assert mean.shape[1:] == ours.latent_shape(RESOLUTION)


def test_positions_are_made_once_for_each_size():
    ours, seen = family(), []
    ours.network = lambda **given: seen.append((given["txt_ids"], given["img_ids"])) or (given["hidden_states"],)
    states = {"encoder_hidden_states": torch.zeros(1, 7, T5_WIDTH), "pooled_projections": torch.zeros(1, WIDTH)}
    for side in (8, 8, 4):
        ours.predict(torch.zeros(1, 4, side, side), torch.zeros(1, dtype=torch.int64), states)
    (text, first), (again, second), (_, smaller) = seen
    assert text is again
    assert first is second
    assert torch.equal(text, torch.zeros(7, 3))
    assert first.tolist() == [[0, y, x] for y in range(4) for x in range(4)]
    assert smaller.tolist() == [[0, y, x] for y in range(2) for x in range(2)]


def packed(latent):
    """(C, H, W) -> (H/2 · W/2, 4 C): each 2 x 2 square one token, written out."""
    channels, height, width = latent.shape
    tokens = [
        torch.stack([latent[c, 2 * y + dy, 2 * x + dx] for c in range(channels) for dy in (0, 1) for dx in (0, 1)])
        for y in range(height // 2)
        for x in range(width // 2)
    ]
    return torch.stack(tokens)


@pytest.mark.parametrize(
    ("name", "flags", "guidance"),
    [("flux dev", {}, 3.5), ("flux dev", {"guidance_scale": 1.0}, 1.0), ("flux schnell", {}, None)],
)
def test_the_loss_of_a_sample_is_that_of_the_published_objective(name, flags, guidance):
    ours = family(name, max_sequence_length=16, **flags)
    timesteps, (latents, noise) = torch.tensor([0, 300, 999]), random_pair(1, 3)
    objective, conditions = ours.objective, ours.encode_captions(CAPTIONS)
    with torch.no_grad():
        prediction = ours.predict(objective.add_noise(latents, noise, timesteps), timesteps, conditions)
        states, pooled, text_ids = ours.pipeline.encode_prompt(CAPTIONS, device="cpu", max_sequence_length=16)
    loss = per_sample_loss(prediction, objective.target(latents, noise, timesteps))
    # dev shifts by resolution, while it draws alone; schnell does not shift. Velocity as in SD 3's paper, section 2.
    sigmas = shifted_sigmas(1.0)
    places = torch.tensor([[0.0, y, x] for y in range(4) for x in range(4)])
    for i, t in enumerate(timesteps.tolist()):
        sigma = float(sigmas[t])
        z = ((1 - sigma) * latents[i].double() + sigma * noise[i].double()).float()
        with torch.no_grad():
            said = ours.pipeline.transformer(
                hidden_states=packed(z)[None],
                timestep=torch.tensor([sigma], dtype=torch.float32),
                guidance=None if guidance is None else torch.tensor([guidance]),
                encoder_hidden_states=states[i : i + 1],
                pooled_projections=pooled[i : i + 1],
                txt_ids=text_ids,
                img_ids=places,
            ).sample[0]
        wanted = functional.mse_loss(said, packed(noise[i] - latents[i])).item()
        assert loss[i].item() == pytest.approx(wanted, rel=1e-4)


def test_the_prediction_lies_where_the_latents_lie():
    ours = family(max_sequence_length=16)
    # A transformer that returns what it is given must give back the latents themselves.
    ours.network = lambda hidden_states, **_: (hidden_states,)
    latents, _ = random_pair(2, 3)
    assert torch.equal(ours.predict(latents, torch.tensor([1, 2, 3]), ours.encode_captions(CAPTIONS)), latents)


@pytest.mark.parametrize(("name", "shift"), [("flux dev", 1.0), ("flux schnell", 1.0)])
def test_noise_levels_are_drawn_evenly_and_unshifted(name, shift):
    objective = family(name).objective
    torch.testing.assert_close(objective.sigmas, torch.from_numpy(shifted_sigmas(shift)).float())
    uniform = torch.arange(0, 1, 0.001, dtype=torch.float64) + 0.0005
    assert objective.sample_timesteps(uniform).tolist() == list(range(1000))
    assert torch.equal(objective.loss_weights(torch.arange(5), None) * torch.ones(5), torch.ones(5))
    levels = objective.levels(torch.arange(1000), 7)
    assert levels.tolist() == [min(int(sigma * 7), 6) for sigma in shifted_sigmas(shift).astype("float32")]
    assert objective.default_bins == 100
