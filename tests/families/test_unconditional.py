"""Denoisers of pixels train, whole and by LoRA, from scratch or not, with classes or without, and draw afterwards."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from audit_runs import save_mosaic
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import DDIMPipeline, DDPMPipeline
from families.pixels import NETWORK, RESOLUTION, pictures, save_pictures, tiny_pixels
from PIL import Image
from runs import assert_equal, run_until
from safetensors.torch import load_file
from torch.nn import functional

from iet_finetune import ClassConditionalPipeline, Config, Trainer, UserError
from iet_finetune.audit import audit
from iet_finetune.config.settings import DataConfig, ModelConfig, ValidationConfig
from iet_finetune.families import find_pipeline, load_family
from iet_finetune.families.unconditional import Unconditional
from iet_finetune.method.objective import per_sample_loss

UNET = "unet/diffusion_pytorch_model.safetensors"
KINDS = ("sock", "hat", "bag")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Pipelines without and with three classes, a network to begin with, and images without and with kinds."""
    folder = tmp_path_factory.mktemp("world")
    tiny_pixels().save_pretrained(folder / "plain")
    tiny_pixels(num_class_embeds=3).save_pretrained(folder / "by-class")
    scheduler = {"num_train_timesteps": 10}
    (folder / "net.json").write_text(json.dumps({**NETWORK, "scheduler": scheduler}))
    (folder / "net-by-class.json").write_text(json.dumps({**NETWORK, "num_class_embeds": 3, "scheduler": scheduler}))
    save_pictures(folder / "images", 8)
    save_pictures(folder / "kinds", 8, KINDS)
    return folder


STARTS = {
    "pretrained": {"pretrained_model_name_or_path": "plain", "train_data_dir": "images"},
    "scratch": {"model_config": "net.json", "train_data_dir": "images"},
    "pretrained by class": {
        "pretrained_model_name_or_path": "by-class",
        "train_data_dir": "kinds",
        "class_column": "kind",
    },
    "scratch by class": {"model_config": "net-by-class.json", "train_data_dir": "kinds", "class_column": "kind"},
}
PATHS = ("pretrained_model_name_or_path", "model_config", "train_data_dir")


def config(world: Path, output: Path, start: str = "pretrained", **flags: Any) -> Config:
    """K = 2, two rounds of two steps a clone; images before and after."""
    begin = {name: str(world / value) if name in PATHS else value for name, value in STARTS[start].items()}
    defaults = {
        "output_dir": str(output),
        "resolution": RESOLUTION,
        "num_shards": 2,
        "train_batch_size": 2,
        "num_train_epochs": 2,
        "merge_every_epochs": 1,
        "learning_rate": 1e-3,
        "random_flip": True,
        "use_ema": True,
        "agc_threshold": 0.5,
        "num_validation_images": 2,
        "validation_rounds": 2,
        "validation_inference_steps": 2,
        "checkpointing_steps": 1,
        "report_to": "none",
    }
    return Config.from_flags(**{**begin, **defaults, **flags})


def train(world: Path, output: Path, start: str = "pretrained", **flags: Any) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Trainer(config(world, output, start, **flags)).train()


def refusal(world: Path, output: Path, start: str = "pretrained", **flags: Any) -> str:
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError) as caught:
        Trainer(config(world, output, start, **flags))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def in_a_fresh_process(code: str, *arguments: Any) -> str:
    done = processes.run([sys.executable, "-c", code, *map(str, arguments)])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


DRAW = """
import sys, numpy, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
image = pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
print(type(pipeline).__name__, image.size, numpy.asarray(image).std() > 1)
"""
DRAW_BY_CLASS = """
import sys, torch
from diffusers import DiffusionPipeline
from iet_finetune import ClassConditionalPipeline
print(type(DiffusionPipeline.from_pretrained(sys.argv[1])).__name__)
pipeline = ClassConditionalPipeline.from_pretrained(sys.argv[1])
generators = [torch.Generator().manual_seed(0) for _ in range(2)]
images = pipeline(class_labels=[0, 2], num_inference_steps=2, generator=generators).images
print([image.size for image in images], images[0] != images[1])
"""


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("start", STARTS)
def test_two_rounds_change_the_weights_and_the_result_draws_in_a_fresh_process(world, tmp_path, start, use_lora):
    flags = {"use_lora": True, "rank": 2, "learning_rate": 1e-2} if use_lora else {}
    output = train(world, tmp_path / "out", start, **flags)
    settings = config(world, tmp_path / "out", start)
    before = load_family(find_pipeline(settings.model), settings).denoiser.state_dict()
    after = load_file(output / UNET)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert after.keys() == before.keys()
    if use_lora:
        attention = (".to_q.", ".to_k.", ".to_v.", ".to_out.0.")
        assert changed == {name for name in before if name.endswith(".weight") and any(a in name for a in attention)}
        assert not (output / "pytorch_lora_weights.safetensors").exists()
    else:
        assert len(changed) == len(before)
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2
    assert (output / "validation" / "before_after.png").is_file()
    if "class" in start:
        assert in_a_fresh_process(DRAW_BY_CLASS, output) == f"DDPMPipeline\n{[(RESOLUTION, RESOLUTION)] * 2} True"
    else:
        assert in_a_fresh_process(DRAW, output) == f"DDPMPipeline ({RESOLUTION}, {RESOLUTION}) True"


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("start", ["pretrained", "scratch by class"])
def test_learning_rate_zero_returns_the_same_bits(world, tmp_path, start, use_lora):
    flags = {"use_lora": True} if use_lora else {}
    settings = config(world, tmp_path / "out", start)
    before = load_family(find_pipeline(settings.model), settings).denoiser.state_dict()
    assert_equal(load_file(train(world, tmp_path / "out", start, learning_rate=0.0, **flags) / UNET), before)


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("start", ["pretrained by class", "scratch"])
def test_a_resumed_run_ends_with_the_same_bits(world, tmp_path, start, use_lora):
    flags = {"use_lora": True, "rank": 2} if use_lora else {}
    whole = load_file(train(world, tmp_path / "whole", start, **flags) / UNET)
    AcceleratorState._reset_state(reset_partial_state=True)
    run_until(config(world, tmp_path / "cut", start, **flags), 5)
    resumed = train(world, tmp_path / "cut", start, resume_from_checkpoint="latest", **flags)
    assert_equal(load_file(resumed / UNET), whole)


def test_another_seed_or_other_classes_are_another_run(world, tmp_path):
    train(world, tmp_path / "out", "scratch by class")
    again = {"resume_from_checkpoint": "latest"}
    assert "`--seed` has changed" in refusal(world, tmp_path / "out", "scratch by class", seed=1, **again)
    rows = (world / "kinds" / "metadata.jsonl").read_text().replace('"hat"', '"zip"')
    other = save_pictures(tmp_path / "other", 8, KINDS)
    (other / "metadata.jsonl").write_text(rows)
    message = refusal(world, tmp_path / "out", "scratch by class", train_data_dir=str(other), **again)
    assert "the training data has changed" in message


def test_a_pipeline_with_all_its_files_in_one_folder_is_trained_as_well(world, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for part in ("unet", "scheduler"):
        for file in (world / "plain" / part).iterdir():
            (flat / file.name).write_bytes(file.read_bytes())
    (flat / "model_index.json").write_bytes((world / "plain" / "model_index.json").read_bytes())
    ours = train(world, tmp_path / "a", pretrained_model_name_or_path=str(flat), num_train_epochs=1)
    assert_equal(load_file(ours / UNET), load_file(train(world, tmp_path / "b", num_train_epochs=1) / UNET))


def test_the_card_says_how_to_draw_by_class_and_which_class_is_which(world, tmp_path, capsys):
    output = train(world, tmp_path / "out", "scratch by class", num_train_epochs=1)
    card = (output / "README.md").read_text()
    assert "Trained from scratch" in card
    assert "ClassConditionalPipeline.from_pretrained(" in card
    assert "Classes: 0 bag, 1 hat, 2 sock." in card
    assert f'load it with: ClassConditionalPipeline.from_pretrained("{output}")' in capsys.readouterr().out


# --- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("by_class", [False, True], ids=["unconditional", "by class"])
def test_the_loss_of_a_sample_is_that_of_the_published_objective(world, prediction_type, by_class):
    classes = {"num_class_embeds": 3} if by_class else {}
    pipeline = tiny_pixels(prediction_type, timesteps=1000, **classes)
    family = Unconditional(pipeline)
    images = pictures(world / "images")[:3]
    labels, timesteps = torch.tensor([2, 0, 1]), torch.tensor([0, 400, 999])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    latents = family.latents(*family.encode_images(images), noise)
    noisy = family.objective.add_noise(latents, noise, timesteps)
    conditions = family.details(torch.zeros(3, 6, dtype=torch.int64), labels)
    with torch.no_grad():
        ours = per_sample_loss(
            family.predict(noisy, timesteps, conditions), family.objective.target(latents, noise, timesteps)
        )
    # Written from equation 4 of DDPM with its linear schedule; v from appendix D of Progressive Distillation.
    betas = np.linspace(0.0001, 0.02, 1000, dtype=np.float64)
    for i, (t, label) in enumerate(zip(timesteps.tolist(), labels.tolist(), strict=True)):
        alpha_bar = float(np.prod(1 - betas[: t + 1]))
        signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        x_t = (signal * images[i].double() + sigma * noise[i].double()).float()[None]
        told = {"class_labels": torch.tensor([label])} if by_class else {}
        with torch.no_grad():
            said = pipeline.unet(x_t, t, **told).sample[0]
        wanted = {"epsilon": noise[i], "sample": images[i], "v_prediction": signal * noise[i] - sigma * images[i]}
        assert ours[i].item() == pytest.approx(functional.mse_loss(said, wanted[prediction_type]).item(), rel=1e-4)


def test_the_images_are_the_latents(world):
    images = pictures(world / "images")
    mean, std = Unconditional(tiny_pixels()).encode_images(images)
    assert torch.equal(mean, images)
    assert not std.any()


def test_a_model_of_one_channel_sees_grey(world):
    family = Unconditional(tiny_pixels(channels=1))
    grey = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)
    assert torch.equal(family.encode_images(grey.expand(-1, 3, -1, -1))[0], grey)
    coloured = pictures(world / "images")
    ours = family.encode_images(coloured)[0]
    files = sorted((world / "images").glob("*.png"))
    pillows = np.stack([np.asarray(Image.open(file).convert("L")) for file in files])
    assert (ours[:, 0] - torch.from_numpy(pillows).float() / 127.5 + 1).abs().max() <= 1 / 127.5
    assert family.latent_shape(RESOLUTION) == (1, RESOLUTION, RESOLUTION)


def test_every_image_is_trained_with_its_own_class(world, tmp_path):
    trainer = Trainer(config(world, tmp_path / "out", "pretrained by class", random_flip=False))
    told = []
    family, predict = trainer.model.family, trainer.model.family.predict
    family.latents = lambda mean, std, noise: told.append([mean]) or mean
    family.predict = lambda noisy, timesteps, conditions: (
        told[-1].append(conditions["class_labels"]) or predict(noisy, timesteps, conditions)
    )
    trainer.train_rounds()
    images, numbers = pictures(world / "kinds"), [sorted(KINDS).index(KINDS[i % 3]) for i in range(8)]
    pairs = [(image, label) for means, labels in told for image, label in zip(means, labels.tolist(), strict=True)]
    assert len(pairs) == 16
    for image, label in pairs:
        (place,) = [i for i in range(8) if torch.equal(images[i], image)]
        assert label == numbers[place]


def test_a_grey_model_is_trained_and_its_images_go_to_the_tracker(world, tmp_path):
    tiny_pixels(channels=1).save_pretrained(tmp_path / "grey")
    grey = {"pretrained_model_name_or_path": str(tmp_path / "grey"), "report_to": "tensorboard"}
    output = train(world, tmp_path / "out", num_train_epochs=1, **grey)
    assert in_a_fresh_process(DRAW, output) == f"DDPMPipeline ({RESOLUTION}, {RESOLUTION}) True"
    assert list((output / "logs").rglob("events.*"))
    sheet = Image.open(output / "validation" / "round-0001.png")
    assert sheet.size == (2 * RESOLUTION, RESOLUTION)


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_images_are_drawn_by_ddim_with_a_generator_each():
    pipeline = tiny_pixels()
    family = Unconditional(pipeline)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    settings = ValidationConfig(validation_inference_steps=3)
    (prompt,) = family.prompts(settings)
    ours = family.draw(family.sampling_pipeline(), prompt, generators, settings, RESOLUTION)
    ddim = DDIMPipeline(pipeline.unet, pipeline.scheduler)
    for seed, image in zip((4, 5), ours, strict=True):
        theirs = ddim(num_inference_steps=3, generator=torch.Generator().manual_seed(seed)).images[0]
        assert np.abs(np.asarray(image).astype(int) - np.asarray(theirs)).max() <= 1


def by_class(names=("0", "1", "2"), **flags):
    family = Unconditional(tiny_pixels(num_class_embeds=3), Config(data=DataConfig(class_column="kind")))
    family.take_classes(names, 2)
    return family, ValidationConfig(**flags)


def test_a_class_that_is_named_is_the_one_that_is_drawn():
    family, settings = by_class(("bag", "hat", "sock"), validation_prompts=("sock",), validation_inference_steps=2)
    (prompt,) = family.prompts(settings)
    (ours,) = family.draw(family.sampling_pipeline(), prompt, [torch.Generator().manual_seed(0)], settings, RESOLUTION)
    pipeline = ClassConditionalPipeline(family.denoiser, family.pipeline.scheduler)
    drawn = []
    for label in range(3):
        generator = torch.Generator().manual_seed(0)
        drawn += pipeline(label, num_inference_steps=2, generator=generator).images
    assert [image == ours for image in drawn] == [False, False, True]


def test_without_prompts_the_first_classes_are_drawn():
    assert by_class()[0].prompts(ValidationConfig()) == ("0", "1", "2")
    many = Unconditional(tiny_pixels(num_class_embeds=20), Config(data=DataConfig(class_column="kind")))
    many.take_classes(tuple(str(i) for i in range(20)), 19)
    assert many.prompts(ValidationConfig()) == tuple("01234567")


def test_a_saved_class_conditional_pipeline_is_one_of_diffusers(tmp_path):
    pipeline = ClassConditionalPipeline(tiny_pixels(num_class_embeds=3).unet, tiny_pixels().scheduler)
    pipeline.save_pretrained(tmp_path)
    assert type(DDPMPipeline.from_pretrained(tmp_path)).__name__ == "DDPMPipeline"
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "DDIMPipeline"
    again = ClassConditionalPipeline.from_pretrained(tmp_path)
    drawn = [
        one([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for one in (pipeline, again)
    ]
    assert drawn[0].shape == (2, 3, RESOLUTION, RESOLUTION)
    assert torch.equal(*drawn)
    assert 0 <= drawn[0].min() < drawn[0].max() <= 1


def test_a_class_conditional_pipeline_in_memory_is_trained_and_audited(tmp_path):
    pipeline = ClassConditionalPipeline(tiny_pixels(num_class_embeds=2).unet, tiny_pixels().scheduler)
    images = [Image.fromarray(np.full((RESOLUTION, RESOLUTION, 3), 40 * shade, np.uint8)) for shade in range(6)]
    features = Features({"image": ImageFeature(), "kind": Value("int64")})
    table = Dataset.from_dict({"image": images, "kind": [0, 1] * 3}, features=features)
    before = pipeline.unet.conv_in.weight.clone()
    config = Config.from_flags(
        output_dir=str(tmp_path / "run"), class_column="kind", resolution=RESOLUTION, train_batch_size=2, num_shards=1,
        max_train_steps=2, merge_every_steps=2, report_to="none", validation_inference_steps=1,
    )  # fmt: skip
    Trainer(config, pipeline=pipeline, dataset=table).train()
    assert not torch.equal(pipeline.unet.conv_in.weight, before)
    found = audit(
        pipeline, table, table.select([0, 1, 2]), silent=True, num_images=4, num_inference_steps=2,
        class_column="kind", features=[str(save_mosaic(tmp_path))],
    )  # fmt: skip
    assert found.metrics


def test_a_class_conditional_pipeline_says_what_it_cannot_draw():
    pipeline = ClassConditionalPipeline(tiny_pixels(num_class_embeds=3).unet, tiny_pixels().scheduler)
    with pytest.raises(ValueError, match="class_labels has 3, and the model's classes are 0 to 2"):
        pipeline([0, 3])
    with pytest.raises(ValueError, match="1 generators for 2 class_labels"):
        pipeline([0, 1], generator=[torch.Generator()])


# --- what is refused -------------------------------------------------------------------------------------------------


def test_classes_and_models_that_do_not_go_together_are_refused_in_one_line(world, tmp_path):
    kinds = {"train_data_dir": str(world / "kinds"), "class_column": "kind"}
    assert "`--class_column kind`: the DDPMPipeline takes no classes" in refusal(world, tmp_path / "a", **kinds)
    assert "say with `--class_column COLUMN`" in refusal(
        world, tmp_path / "b", "pretrained by class", class_column=None
    )
    four = save_pictures(tmp_path / "four", 8, (0, 1, 2, 3))
    message = refusal(world, tmp_path / "c", "pretrained by class", train_data_dir=str(four))
    assert "`--class_column kind` has class 3, but the model knows 3: 0 to 2" in message


def test_prompts_that_cannot_be_drawn_are_refused_in_one_line(world, tmp_path):
    message = refusal(world, tmp_path / "a", validation_prompts=["a cat"])
    assert "`--validation_prompts a cat`: this model takes no prompts" in message
    message = refusal(world, tmp_path / "d", validation_guidance_scale=3.0)
    assert "`--validation_guidance_scale 3.0` means nothing to a DDPMPipeline: leave it out" in message
    message = refusal(world, tmp_path / "e", caption_dropout=0.1)
    assert "`--caption_dropout 0.1` means nothing to a DDPMPipeline: leave it out" in message
    message = refusal(world, tmp_path / "b", "pretrained by class", validation_prompts=["hot"])
    assert "`--validation_prompts hot` is no class in `--class_column kind`. Did you mean `hat`?" in message
    message = refusal(world, tmp_path / "c", "pretrained by class", validation_prompts=["xyz"])
    assert "It has bag, hat, sock." in message


@pytest.mark.parametrize("form", ["truncate", "full_rank"])
def test_a_lora_file_that_no_pipeline_loads_is_not_written(world, tmp_path, form):
    message = refusal(world, tmp_path / "out", use_lora=True, lora_export=form)
    assert f"`--lora_export {form}`: a DDPMPipeline loads no LoRA files: choose `fuse`" in message


def test_the_resolution_must_be_what_the_model_draws(world, tmp_path):
    assert "`--resolution 32` is not the size of the images that this model generates: 16 x 16" in refusal(
        world, tmp_path / "a", resolution=32
    )
    assert "must be a multiple of 2" in refusal(world, tmp_path / "b", resolution=15)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"out_channels": 6}, "takes 3 channels and gives 6"),
        ({"in_channels": 4, "out_channels": 4}, "takes 4 channels and gives 4"),
        ({"class_embed_type": "identity"}, "embeddings of classes"),
    ],
)
def test_a_network_that_is_trained_in_another_way_is_refused(network, message):
    with pytest.raises(UserError, match=message):
        Unconditional(tiny_pixels(**network))


def test_the_ledger_of_a_folder_without_captions_has_every_image(world, tmp_path):
    output = train(world, tmp_path / "out", num_train_epochs=1)
    table = pq.read_table(output / "ledger.parquet")
    assert sorted(table["seen"].to_pylist()) == [1] * 8


def test_a_prediction_type_can_be_chosen_from_scratch(world):
    model = ModelConfig(model_config=str(world / "net.json"), prediction_type="v_prediction")
    family = load_family(find_pipeline(model), Config(model=model, data=DataConfig(resolution=RESOLUTION)))
    assert family.objective.prediction_type == "v_prediction"
    assert family.pipeline.scheduler.config.prediction_type == "v_prediction"
