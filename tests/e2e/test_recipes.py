"""Every recipe runs, shrunk by `--smoke`, and is listed with one line."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline

from iet_finetune import Config, Trainer, UserError
from iet_finetune.cli.recipes_command import recipes_command
from iet_finetune.config.config import flag_names
from iet_finetune.families import FAMILIES
from iet_finetune.families.smoke import KNOWN, shrink
from iet_finetune.families.tiny import TINY

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"), key=lambda path: path.stem)
PAPER = ("cifar10", "cifar100", "afhq_dog", "laion10k_sd21")


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_when_it_is_shrunk_and_prints_nothing_alarming(recipe, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)  # from where a recipe counts its paths
    argv = ["--config", str(recipe), "--smoke", "--output_dir", str(tmp_path / "out")]
    output = Trainer(Config.from_command_line(argv)).train()
    assert output == tmp_path / "out-smoke"
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2
    assert (output / "model_index.json").is_file() or (output / "pytorch_lora_weights.safetensors").is_file()
    effective = yaml.safe_load((output / "training_config.yaml").read_text())
    kept = ("num_shards", "agc_threshold", "agc_decay", "use_lora", "use_ema", "image_column", "class_column")
    for name in kept:
        assert effective[name] == read(recipe.stem).get(name, Config().to_flags()[name]), name
    said = "".join(capfd.readouterr())
    assert not re.search("[Ww]arning|hardly skip|cannot tell|truncated|indexing errors", said), said


@pytest.mark.parametrize("name", PAPER)
def test_the_twins_of_a_paper_recipe_are_plain_training_on_the_same_data(name):
    recipe, passes, steps = read(name), read(f"{name}_plain"), read(f"{name}_plain_steps")
    for twin in (passes, steps):
        assert (twin["num_shards"], twin["agc_threshold"]) == (1, 0.0)
        same = {*recipe, *twin} - {
            *("output_dir", "num_shards", "shard_strategy", "shard_by_column", "agc_threshold", "agc_decay"),
            *("optimizer_across_rounds", "merge_every_epochs", "merge_every_steps", "num_train_epochs"),
            *("max_train_steps", "lr_warmup_steps", "validation_rounds"),
        }
        assert {key: twin.get(key) for key in same} == {key: recipe.get(key) for key in same}


# Recipe -> training images.
SIZES = {"cifar10": 50_000, "cifar100": 50_000, "afhq_dog": 4_739, "laion10k_sd21": 10_000}


@pytest.mark.parametrize("name", PAPER)
def test_the_twins_see_as_many_images_and_take_as_many_steps(name):
    recipe, passes, steps = read(name), read(f"{name}_plain"), read(f"{name}_plain_steps")
    batch, images, shards = recipe["train_batch_size"], SIZES[name], recipe["num_shards"]
    if "num_train_epochs" in recipe:
        assert passes["num_train_epochs"] == recipe["num_train_epochs"]
        of_a_clone = recipe["num_train_epochs"] * math.ceil(math.ceil(images / shards) / batch)
    else:
        of_a_clone = recipe["max_train_steps"]
        assert passes["max_train_steps"] == of_a_clone * shards
    assert steps["max_train_steps"] == of_a_clone


def test_each_recipe_is_listed_with_what_it_is():
    lines = recipes_command([]).splitlines()
    assert len(lines) == len(RECIPES)
    for line, recipe in zip(lines, RECIPES, strict=True):
        assert f"{recipe.stem}.yaml" in line
        assert len(line.split(".yaml", 1)[1].strip()) > 20


def test_a_recipe_says_nothing_that_is_not_a_flag_and_begins_with_what_it_is():
    for recipe in RECIPES:
        text = recipe.read_text()
        assert text.startswith("# "), recipe
        assert set(yaml.safe_load(text)) <= set(flag_names())
        for command in re.findall(r"--config (configs/\S+)", text):
            assert (ROOT / command).is_file()
            assert command == f"configs/{recipe.name}" or command.startswith("configs/accelerate/")


@pytest.mark.parametrize("kind", sorted(TINY))
def test_any_pipeline_that_can_be_trained_has_a_small_one(kind, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    flags = {"pretrained_model_name_or_path": str(tmp_path / "base"), "train_data_dir": "x", "output_dir": "out"}
    small = shrink(Config.from_flags(**flags), tmp_path)
    assert type(DiffusionPipeline.from_pretrained(small.model.pretrained_model_name_or_path)).__name__ == kind
    captions = (tmp_path / "images" / "metadata.jsonl").exists()
    assert captions == (kind not in ("DDPMPipeline", "DDIMPipeline"))


def test_there_is_a_small_pipeline_for_every_family():
    assert set(TINY) == set(FAMILIES)


def test_a_second_try_in_the_same_folder_goes_on_where_the_first_stopped(tmp_path, capsys):
    flags = {"model_config": "cifar100", "train_data_dir": "x", "class_column": "kind", "smoke": True}
    flags |= {"output_dir": str(tmp_path / "out"), "num_shards": 2, "validation_prompts": ["apple"]}
    output = Trainer(Config.from_flags(**flags)).train()
    with pytest.raises(UserError, match="is not empty"):
        Trainer(Config.from_flags(**flags))
    assert Trainer(Config.from_flags(**flags, resume_from_checkpoint="latest")).train() == output
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["./nothing", "no/such/name", "a" * 300])
def test_a_pipeline_that_cannot_be_looked_up_is_named_in_one_line(name, tmp_path):
    config = Config.from_flags(pretrained_model_name_or_path=name, train_data_dir="x", output_dir="out")
    with pytest.raises(UserError) as caught:
        shrink(config, tmp_path)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert said.startswith(f"`--smoke` cannot find out what `--pretrained_model_name_or_path {name}` is: ")


def test_the_pipelines_of_the_recipes_need_not_be_looked_up():
    named = {read(recipe.stem).get("pretrained_model_name_or_path") for recipe in RECIPES} - {None}
    assert {name for name in named if "/" in name and not (ROOT / name).exists()} <= set(KNOWN)
    assert set(KNOWN.values()) <= set(TINY)
