"""Pipelines are found, recognised, encoded and saved as diffusers itself does it."""

import json

import pytest
import torch
from tiny import RESOLUTION, save_tiny_sd, tiny_sd

from iet_finetune import UserError
from iet_finetune.config.config import Config
from iet_finetune.config.settings import ModelConfig
from iet_finetune.families import find_pipeline, in_chunks, load_family, save_pipeline
from iet_finetune.families.base import check_resolution
from iet_finetune.families.stable_diffusion import StableDiffusion


@pytest.fixture
def family():
    return StableDiffusion(tiny_sd())


def model(folder, **settings) -> ModelConfig:
    return ModelConfig(pretrained_model_name_or_path=str(folder), **settings)


def test_captions_are_encoded_as_the_pipeline_encodes_prompts(family):
    captions = ["a thing", "another, much longer thing that is cut off"]
    expected, _ = family.pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
    assert torch.equal(family.encode_captions(captions)["encoder_hidden_states"], expected)


def test_latents_are_scaled_draws_from_the_posterior(family):
    pixels = torch.rand(2, 3, RESOLUTION, RESOLUTION) * 2 - 1
    mean, std = family.encode_images(pixels)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    posterior = family.pipeline.vae.encode(pixels).latent_dist
    sample = posterior.sample(generator=torch.Generator().manual_seed(3))
    assert torch.equal(family.latents(mean, std, noise), sample * family.pipeline.vae.config.scaling_factor)
    assert mean.shape[1:] == family.latent_shape(RESOLUTION)


def test_only_the_denoiser_has_gradients(family):
    family.place(torch.device("cpu"))
    trained = {name for name, c in family.pipeline.components.items() if isinstance(c, torch.nn.Module)
               and any(parameter.requires_grad for parameter in c.parameters())}  # fmt: skip
    assert trained == {"unet"}


def test_timesteps_cover_the_schedule_evenly(family):
    uniform = torch.arange(0, 1, 0.001, dtype=torch.float64) + 0.0005
    assert family.objective.sample_timesteps(uniform).tolist() == list(range(1000))


def test_the_prediction_type_can_be_overridden_and_is_then_saved(tmp_path):
    save_tiny_sd(tmp_path / "base")
    settings = model(tmp_path / "base", prediction_type="v_prediction")
    family = load_family(find_pipeline(settings), Config(model=settings))
    assert family.objective.prediction_type == "v_prediction"
    save_pipeline(family.pipeline, tmp_path / "out", {})
    saved = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"
    assert saved["beta_end"] == 0.012


def test_the_precision_of_each_component_is_read_from_its_files(tmp_path):
    pipeline = tiny_sd()
    pipeline.vae.to(torch.bfloat16)
    pipeline.unet.to(torch.float16)
    pipeline.save_pretrained(tmp_path)
    assert find_pipeline(model(tmp_path)).dtypes == {
        "vae": torch.bfloat16,
        "unet": torch.float16,
        "text_encoder": torch.float32,
    }


def test_a_variant_is_loaded_and_saved_under_the_plain_name(tmp_path):
    tiny_sd().to(torch.float16).save_pretrained(tmp_path / "base", variant="fp16")
    settings = model(tmp_path / "base", variant="fp16")
    source = find_pipeline(settings)
    assert set(source.dtypes.values()) == {torch.float16}
    save_pipeline(load_family(source, Config(model=settings)).pipeline, tmp_path / "out", source.dtypes)
    assert find_pipeline(model(tmp_path / "out")).dtypes == source.dtypes


def test_components_keep_the_class_names_they_were_stored_under(tmp_path):
    tiny_sd().save_pretrained(tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    (tmp_path / "base" / "feature_extractor").mkdir()
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}}
    (tmp_path / "base" / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(processor))
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    settings = model(tmp_path / "base")
    source = find_pipeline(settings)
    save_pipeline(
        load_family(source, Config(model=settings)).pipeline, tmp_path / "out", source.dtypes, source.classes
    )
    saved = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert {name: saved[name] for name in source.classes} == source.classes
    assert saved["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    load_family(find_pipeline(model(tmp_path / "out")), Config(model=settings))


def test_pickled_weights_are_loaded_safely_and_saved_as_safetensors(tmp_path):
    tiny_sd().save_pretrained(tmp_path / "base", safe_serialization=False)
    assert (tmp_path / "base" / "unet" / "diffusion_pytorch_model.bin").is_file()
    settings = model(tmp_path / "base")
    source = find_pipeline(settings)
    assert set(source.dtypes) == {"vae", "unet", "text_encoder"}
    save_pipeline(load_family(source, Config(model=settings)).pipeline, tmp_path / "out", source.dtypes)
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_a_chunk_always_has_the_same_size():
    sizes = []

    def encode(chunk):
        sizes.append(len(chunk))
        return (torch.stack([torch.tensor(float(i)) for i in chunk]),)

    (result,) = in_chunks(encode, list(range(7)), 3)
    assert sizes == [3, 3, 3]
    assert result.tolist() == [0, 1, 2, 3, 4, 5, 6]
    (result,) = in_chunks(lambda chunk: (chunk * 2,), torch.arange(5), 4)
    assert result.tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(("resolution", "nearest"), [(20, "16 or 24"), (4, "8")])
def test_a_resolution_that_does_not_fit_names_those_that_do(resolution, nearest):
    with pytest.raises(UserError, match=f"`--resolution {resolution}` must be a multiple of 8 .*{nearest}"):
        check_resolution(resolution, 8)
