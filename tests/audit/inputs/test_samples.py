"""The images of an audit follow from prompts and seeds, are kept, and are never mixed up with others."""

import dataclasses
import json

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from tiny import RESOLUTION, save_images, save_tiny_sd

from iet_finetune import Config, UserError
from iet_finetune.audit.inputs.pipelines import find_subject
from iet_finetune.audit.inputs.samples import SETTINGS, draw_samples, plan_samples, read_prompts
from iet_finetune.audit.inputs.work import Work
from iet_finetune.data.dataset import load_images
from iet_finetune.families.tiny import tiny_pixels


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 5)
    return folder


def config_of(world, **changes) -> Config:
    flags = {"train_data_dir": str(world / "data"), "resolution": RESOLUTION, "num_images": 6, "eval_batch_size": 4}
    return Config.from_flags(**(flags | {"num_inference_steps": 2} | changes))


def subject_of(world, config, name="base"):
    import torch

    return find_subject(config, str(world / name), "model").load(torch.device("cpu"))


def planned(world, **changes):
    """The subject, and its plan."""
    config = config_of(world, **changes)
    subject = subject_of(world, config)
    training, heldout = load_images(config.data, cache_dir=None, seed=config.training.seed)
    return subject, plan_samples(config, subject, training, heldout)


def random_images(files) -> list[bytes]:
    return [np.asarray(Image.open(file)).tobytes() for file in files]


def draw(subject, plan, folder, own=False):
    return draw_samples(subject, plan, folder, Work(folder / "work"), own=own)


def test_every_caption_is_drawn_from_before_one_is_drawn_from_again(world):
    _, plan = planned(world, num_images=7)
    captions = {f"thing {number}" for number in range(5)}
    assert set(plan.prompts[:5]) == captions
    assert plan.prompts[5:] == plan.prompts[:2]


def test_a_image_is_that_of_the_pipeline_with_its_prompt_and_seed(world, tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline

    subject, plan = planned(world, num_images=4, eval_batch_size=4, seed=3, sampling_guidance_scale=2.0)
    ours = random_images(draw(subject, plan, tmp_path))
    pipeline = StableDiffusionPipeline.from_pretrained(world / "base", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        list(plan.prompts),
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(3 + number) for number in range(4)],
    ).images
    assert ours == [np.asarray(image).tobytes() for image in theirs]


def test_what_is_missing_is_drawn_again_to_the_same_bits(world, tmp_path):
    subject, plan = planned(world)
    files = draw(subject, plan, tmp_path)
    whole = random_images(files)
    times = [file.stat().st_mtime_ns for file in files]
    files[5].unlink()
    assert random_images(draw(subject, plan, tmp_path)) == whole
    assert [file.stat().st_mtime_ns for file in files[:4]] == times[:4]


def test_more_images_begin_with_the_same_ones(world, tmp_path):
    subject, plan = planned(world, num_images=8)
    more = random_images(draw(subject, plan, tmp_path / "more"))
    subject, fewer = planned(world, num_images=4)
    assert random_images(draw(subject, fewer, tmp_path / "grown")) == more[:4]
    assert random_images(draw(subject, plan, tmp_path / "grown")) == more


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_inference_steps": 3}, "another steps (2 then, 3 now)"),
        ({"sampling_guidance_scale": 3.0}, "another guidance (None then, 3.0 now)"),
        ({"seed": 1}, "another seed (0 then, 1 now)"),
        ({"prompts": "none"}, "another prompts"),
    ],
    ids=["steps", "guidance", "seed", "prompts"],
)
def test_images_drawn_in_another_way_are_refused(world, tmp_path, change, said):
    draw(*planned(world), tmp_path)
    with pytest.raises(UserError) as caught:
        draw(*planned(world, **change), tmp_path)
    assert said in str(caught.value)
    assert "another `--output_dir`" in str(caught.value)


def test_images_of_another_model_are_refused_unless_the_folder_is_the_models_own(world, tmp_path):
    subject, plan = planned(world)
    files = draw(subject, plan, tmp_path)
    before = random_images(files)
    other = dataclasses.replace(plan, model="another", seed=9)
    with pytest.raises(UserError, match="another seed|another model"):
        draw(subject, other, tmp_path)
    assert random_images(files) == before
    assert random_images(draw(subject, other, tmp_path, own=True)) != before


def test_damaged_settings_are_named(world, tmp_path):
    draw(*planned(world, num_images=1), tmp_path)
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(UserError, match=r"settings\.json` is damaged"):
        draw(*planned(world, num_images=1), tmp_path)


def test_prompts_come_from_a_file(world, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n")
    _, plan = planned(world, prompts=str(tmp_path / "prompts.txt"), num_images=3)
    assert sorted(set(plan.prompts)) == ["a cat", "a dog"]


@pytest.mark.parametrize("text", [None, "\n \n"], ids=["no file", "no prompts"])
def test_a_file_without_prompts_is_named(tmp_path, text):
    file = tmp_path / "prompts.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=r"`--prompts .*prompts\.txt`"):
        read_prompts(str(file))


def test_prompts_of_held_out_images_need_some(world):
    with pytest.raises(UserError, match="`--prompts heldout`: there are no such images"):
        planned(world, prompts="heldout")


def test_an_unknown_scheduler_is_refused_and_a_known_one_draws_something_else(world, tmp_path):
    subject, plan = planned(world, num_images=2)
    before = random_images(draw(subject, plan, tmp_path / "a"))
    with pytest.raises(UserError, match="`--scheduler DDIMSchedulr` is no scheduler of diffusers"):
        subject.set_scheduler("DDIMSchedulr")
    with pytest.raises(UserError, match="`--scheduler FlowMatchEulerDiscreteScheduler` does not draw"):
        subject.set_scheduler("FlowMatchEulerDiscreteScheduler")
    subject.set_scheduler("DDPMScheduler")
    assert random_images(draw(subject, plan, tmp_path / "b")) != before


def test_a_model_without_prompts_is_drawn_from_noise_alone(world, tmp_path):
    DDPMPipeline(tiny_pixels(), DDPMScheduler()).save_pretrained(tmp_path / "pixels")
    config = config_of(world, num_images=3)
    subject = subject_of(tmp_path, config, "pixels")
    training, heldout = load_images(config.data, cache_dir=None, seed=0)
    plan = plan_samples(config, subject, training, heldout)
    assert plan.prompts == ("", "", "")
    assert len(set(random_images(draw(subject, plan, tmp_path / "out")))) == 3
    assert json.loads((tmp_path / "out" / SETTINGS).read_text())["scheduler"] == "DDIMScheduler"
    with pytest.raises(UserError, match=r"takes no prompts"):
        plan_samples(config_of(world, prompts="cats.txt"), subject, training, heldout)


def test_images_of_prompts_that_were_cut_at_another_length_are_not_taken_up(world, tmp_path):
    from iet_finetune.families.tiny import save_tiny_pipeline

    save_tiny_pipeline("PixArtSigmaPipeline", tmp_path / "pixart")
    name = str(tmp_path / "pixart")
    plans = []
    for length in (8, 12):
        config = config_of(world, max_sequence_length=length)
        subject = subject_of(world, config, name)
        images = load_images(config.data, cache_dir=None, seed=0)
        plans.append(plan_samples(config, subject, *images))
        assert subject.options["max_sequence_length"] == length
    assert plans[0].model == plans[1].model
    draw(subject, dataclasses.replace(plans[0], prompts=(), classes=()), tmp_path / "out")
    with pytest.raises(UserError, match=r"another max_sequence_length \(8 then, 12 now\)"):
        draw(subject, dataclasses.replace(plans[1], prompts=(), classes=()), tmp_path / "out")
