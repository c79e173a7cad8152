"""SDXL sees the text, the size and the crop of each image as its own pipeline and training script have it."""

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler
from families.text_to_image import config
from PIL import Image
from tiny import RESOLUTION
from tiny_families import WIDTH, tiny_pipeline
from torch.nn import functional

from iet_finetune import Config, Trainer, UserError
from iet_finetune.config.settings import DataConfig
from iet_finetune.data.loader import Visit
from iet_finetune.families.stable_diffusion_xl import StableDiffusionXL
from iet_finetune.method.objective import per_sample_loss

CAPTIONS = ["a thing", "", "another, much longer thing that is cut off"]
SIZES = torch.tensor([[16, 40, 0, 7, 16, 16], [90, 16, 12, 0, 16, 16], [16, 16, 0, 0, 16, 16]])


def family(**settings) -> StableDiffusionXL:
    return StableDiffusionXL(tiny_pipeline("sdxl", **settings), Config(data=DataConfig(resolution=RESOLUTION)))


def test_captions_are_encoded_as_the_pipeline_encodes_prompts():
    ours = family()
    conditions = ours.encode_captions(CAPTIONS)
    with torch.no_grad():
        states, _, pooled, _ = ours.pipeline.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
    assert torch.equal(conditions["encoder_hidden_states"], states)
    assert torch.equal(conditions["text_embeds"], pooled)
    assert states.shape == (3, 12, 2 * WIDTH)


def test_the_text_is_the_states_before_the_last_layers_and_the_second_projection():
    ours = family()
    pipeline, conditions = ours.pipeline, ours.encode_captions(CAPTIONS)
    ids = [
        one(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        for one in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    assert not torch.equal(*ids)
    with torch.no_grad():
        first = pipeline.text_encoder(ids[0], output_hidden_states=True)
        second = pipeline.text_encoder_2(ids[1], output_hidden_states=True)
    assert torch.equal(conditions["encoder_hidden_states"][..., :WIDTH], first.hidden_states[1])
    assert torch.equal(conditions["encoder_hidden_states"][..., WIDTH:], second.hidden_states[2])
    assert torch.equal(conditions["text_embeds"], second.text_embeds)


def test_latents_are_scaled_draws_from_the_posterior():
    ours = family()
    pixels = torch.rand(2, 3, RESOLUTION, RESOLUTION) * 2 - 1
    mean, std = ours.encode_images(pixels)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    posterior = ours.pipeline.vae.encode(pixels).latent_dist
    sample = posterior.sample(generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours.latents(mean, std, noise), sample * 0.13025)
    assert mean.shape[1:] == ours.latent_shape(RESOLUTION)


def test_a_vae_with_its_own_mean_and_deviation_is_used_as_the_pipeline_undoes_it():
    ours = family()
    centre, spread = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 1.0, 4.0]
    ours.pipeline.vae.register_to_config(latents_mean=centre, latents_std=spread)
    mean = torch.randn(2, 4, 8, 8)
    latents = ours.latents(mean, torch.zeros_like(mean), torch.zeros_like(mean))
    # As in the pipeline's last step before it decodes.
    undone = latents * torch.tensor(spread).view(1, 4, 1, 1) / 0.13025 + torch.tensor(centre).view(1, 4, 1, 1)
    torch.testing.assert_close(undone, mean)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_of_a_sample_is_that_of_the_published_objective(prediction_type):
    ours = family(prediction_type=prediction_type)
    unet, timesteps = ours.pipeline.unet, torch.tensor([0, 400, 999])
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    conditions = ours.encode_captions(CAPTIONS) | ours.details(SIZES, torch.zeros(3, dtype=torch.int64))
    objective = ours.objective
    with torch.no_grad():
        prediction = ours.predict(objective.add_noise(latents, noise, timesteps), timesteps, conditions)
    loss = per_sample_loss(prediction, objective.target(latents, noise, timesteps))
    with torch.no_grad():
        states, _, pooled, _ = ours.pipeline.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
    # Equation 4 of DDPM with the scaled linear schedule of SDXL's scheduler; section 2.2 of the SDXL paper.
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    for i, t in enumerate(timesteps.tolist()):
        alpha_bar = float(np.prod(1 - betas[: t + 1]))
        signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        x_t = (signal * latents[i].double() + sigma * noise[i].double()).float()[None]
        told = {
            "text_embeds": pooled[i : i + 1],
            "time_ids": torch.tensor([SIZES[i].tolist()]),
        }
        with torch.no_grad():
            said = unet(x_t, t, encoder_hidden_states=states[i : i + 1], added_cond_kwargs=told).sample[0]
        wanted = noise[i] if prediction_type == "epsilon" else signal * noise[i] - sigma * latents[i]
        assert loss[i].item() == pytest.approx(functional.mse_loss(said, wanted).item(), rel=1e-4)


def test_the_unet_receives_each_number_of_size_and_crop():
    ours = family()
    noisy, timesteps = torch.randn(1, 4, 8, 8).expand(7, -1, -1, -1), torch.full((7,), 500)
    text = {name: value.expand(7, *value.shape[1:]) for name, value in ours.encode_captions(["a thing"]).items()}
    sizes = torch.full((7, 6), 20)
    for number in range(6):
        sizes[number + 1, number] += 5
    ids = ours.details(sizes, torch.zeros(7, dtype=torch.int64))["time_ids"]
    with torch.no_grad():
        prediction = ours.predict(noisy, timesteps, text | {"time_ids": ids})
    for other in range(1, 7):
        assert not torch.allclose(prediction[0], prediction[other], atol=1e-5)


# --- what is told of an image is what was done to it -----------------------------------------------------------------


def marked(folder, sizes):
    """Images each of whose pixels names its row in red and its column in green; blue is the image's number."""
    folder.mkdir(parents=True)
    rows = []
    for number, (width, height) in enumerate(sizes):
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[..., 0], pixels[..., 1], pixels[..., 2] = np.arange(height)[:, None], np.arange(width), number
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(f'{{"file_name": "{number}.png", "text": "thing {number}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(rows))


@pytest.mark.parametrize("center_crop", [False, True], ids=["random crop", "centre crop"])
def test_size_and_crop_are_those_of_what_the_unet_sees(tmp_path, center_crop):
    tiny_pipeline("sdxl").save_pretrained(tmp_path / "base")
    # The shorter side is the resolution, so that a pixel still names the place it comes from.
    shapes = [(RESOLUTION, RESOLUTION), (RESOLUTION, 61), (90, RESOLUTION), (37, RESOLUTION)]
    marked(tmp_path / "data", shapes)
    flags = {"num_shards": 1, "random_flip": True, "center_crop": center_crop, "image_interpolation_mode": "nearest"}
    flags["cache_latents"] = False
    trainer = Trainer(config(tmp_path, tmp_path / "out", **flags))
    (shard,), ours = trainer.data.shards, trainer.model.family
    flips = set()
    for pass_ in range(6):
        for position in range(4):
            sample = shard[Visit(pass_, position)]
            pixels = ((sample.pixel_values + 1) * 127.5).round().long()
            (row, column, number), next_column = pixels[:, 0, 0].tolist(), int(pixels[1, 0, 1])
            width, height = shapes[number]
            flipped = next_column < column
            flips.add((number, flipped))
            # As in the training script, which mirrors the image and then crops it.
            left = width - 1 - column if flipped else column
            told = ours.details(sample.sizes[None], torch.zeros(1, dtype=torch.int64))["time_ids"]
            assert told.tolist() == [[height, width, row, left, RESOLUTION, RESOLUTION]]
    assert flips == {(number, flipped) for number in range(4) for flipped in (False, True)}


def test_a_resized_image_is_conditioned_on_its_stored_size(tmp_path):
    tiny_pipeline("sdxl").save_pretrained(tmp_path / "base")
    marked(tmp_path / "data", [(3 * RESOLUTION, 7 * RESOLUTION)] * 2)
    flags = {"num_shards": 1, "image_interpolation_mode": "nearest", "cache_latents": False}
    trainer = Trainer(config(tmp_path, tmp_path / "out", **flags))
    (shard,), ours = trainer.data.shards, trainer.model.family
    for position in range(2):
        sample = shard[Visit(0, position)]
        told = ours.details(sample.sizes[None], torch.zeros(1, dtype=torch.int64))["time_ids"][0].tolist()
        row = float((sample.pixel_values[0, 0, 0] + 1) * 127.5)
        assert told[:2] == [7 * RESOLUTION, 3 * RESOLUTION]
        # Of three rows one was kept: the crop's place is that in the resized image.
        assert told[2] == int(row / 3)
        assert told[3:] == [0, RESOLUTION, RESOLUTION]


def test_a_training_step_receives_the_conditions_of_its_own_images(tmp_path):
    tiny_pipeline("sdxl").save_pretrained(tmp_path / "base")
    shapes = [(RESOLUTION, 61), (90, RESOLUTION), (37, RESOLUTION), (RESOLUTION, 80)]
    marked(tmp_path / "data", shapes)
    flags = {"validation_prompts": [], "random_flip": True, "cache_latents": False}
    trainer = Trainer(config(tmp_path, tmp_path / "out", **flags))
    ours, seen = trainer.model.family, []
    encode, predict = ours.encode_images, ours.predict

    def encode_images(pixels):
        seen.append([pixels, None])
        return encode(pixels)

    def predict_noise(noisy, timesteps, conditions):
        seen[-1][1] = conditions["time_ids"]
        return predict(noisy, timesteps, conditions)

    ours.encode_images, ours.predict = encode_images, predict_noise
    trainer.train_rounds()
    pairs = [(image, ids) for images, told in seen for image, ids in zip(images, told, strict=True)]
    assert len(pairs) == 8
    for image, ids in pairs:
        row, column, number = ((image[:, 0, 0] + 1) * 127.5).round().long().tolist()
        width, height = shapes[number]
        # Captions apart, `nearest` and the shorter side as it is leave every pixel where it can be found again.
        mirrored = ((image[1, 0, 1] + 1) * 127.5).round() < column
        assert ids.tolist() == [height, width, row, width - 1 - column if mirrored else column, 16, 16]


# --- drawing, and what is refused ------------------------------------------------------------------------------------


def test_empty_prompts_are_drawn_as_by_the_pipeline_that_came():
    for force_zeros in (True, False):
        ours = family(force_zeros=force_zeros)
        assert ours.sampling_pipeline().config.force_zeros_for_empty_prompt == force_zeros


def test_a_scheduler_without_a_noise_schedule_is_refused():
    pipeline = tiny_pipeline("sdxl")
    pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(UserError, match="a EDMEulerScheduler|an EDMEulerScheduler") as caught:
        StableDiffusionXL(pipeline)
    assert "cannot be trained" in str(caught.value)
