"""From scratch: random weights that follow from the seed, out of a file or a network known by name."""

import json

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, UNet2DModel
from families.pixels import NETWORK, RESOLUTION, tiny_pixels

from iet_finetune import Config, UserError
from iet_finetune.config.settings import PRESETS, ModelConfig
from iet_finetune.families import find_pipeline, load_family
from iet_finetune.families.scratch import build_pipeline, read_recipe, small_recipe


def write(path, content):
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))
    return str(path)


def refusal(path, content):
    with pytest.raises(UserError) as caught:
        build_pipeline(write(path, content), RESOLUTION, 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_seed_alone_decides_the_weights_and_the_global_generator_is_left_alone(tmp_path):
    recipe = write(tmp_path / "net.yaml", NETWORK)
    before = torch.random.get_rng_state()
    first = build_pipeline(recipe, RESOLUTION, 3).unet.state_dict()
    torch.manual_seed(1)
    again = build_pipeline(recipe, RESOLUTION, 3).unet.state_dict()
    other = build_pipeline(recipe, RESOLUTION, 4).unet.state_dict()
    torch.random.set_rng_state(before)
    build_pipeline(recipe, RESOLUTION, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


@pytest.mark.parametrize("name", PRESETS)
def test_a_network_known_by_name_has_a_small_twin_of_the_same_blocks_that_can_be_built(tmp_path, name):
    network, scheduler = read_recipe(name)
    small, resolution = small_recipe(name)
    assert {key for key in network if network[key] != small[key]} <= {
        *("block_out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim", "sample_size"),
    }
    assert small["scheduler"] == scheduler
    assert scheduler["num_train_timesteps"] == 1000
    unet = build_pipeline(write(tmp_path / "small.json", small), resolution, 0).unet
    labels = {"class_labels": torch.tensor([1])} if "num_class_embeds" in network else {}
    shape = (1, network["in_channels"], resolution, resolution)
    assert unet(torch.randn(shape), 1, **labels).sample.shape == shape
    assert unet.num_parameters() < 100_000
    assert find_pipeline(ModelConfig(model_config=name)).class_name == "DDPMPipeline"


@pytest.mark.parametrize(("name", "parameters"), [("cifar10", 35.7), ("cifar100", 35.8), ("afhq_dog", 78.7)])
def test_the_networks_of_the_paper_have_the_sizes_of_their_recipes(name, parameters):
    network, _ = read_recipe(name)
    with torch.device("meta"):
        unet = UNet2DModel(**network)
    assert unet.num_parameters() / 1e6 == pytest.approx(parameters, abs=0.05)
    assert network["dropout"] == 0.1
    assert network["block_out_channels"][:4] == [128, 256, 256, 256]
    levels = [level for level, kind in enumerate(network["down_block_types"]) if "Attn" in kind]
    sides = [network["sample_size"] >> level for level in levels]
    assert sides == [16]


def test_a_config_file_of_diffusers_works_as_it_is(tmp_path):
    tiny_pixels().save_pretrained(tmp_path / "saved")
    ours = build_pipeline(str(tmp_path / "saved" / "unet" / "config.json"), RESOLUTION, 0).unet
    theirs = UNet2DModel.from_pretrained(tmp_path / "saved" / "unet")
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
    settings = [{k: v for k, v in unet.config.items() if not k.startswith("_")} for unet in (ours, theirs)]
    assert settings[0] == settings[1]


def test_the_scheduler_of_the_file_is_the_one_that_is_saved(tmp_path):
    scheduler = {"num_train_timesteps": 20, "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}
    recipe = write(tmp_path / "net.json", {**NETWORK, "scheduler": scheduler})
    build_pipeline(recipe, RESOLUTION, 0).save_pretrained(tmp_path / "out")
    saved = DDPMPipeline.from_pretrained(tmp_path / "out").scheduler.config
    assert {name: saved[name] for name in scheduler} == scheduler


def test_a_number_that_yaml_takes_for_text_is_a_number(tmp_path):
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(NETWORK) + "norm_eps: 1e-4\n")
    assert read_recipe(str(tmp_path / "net.yaml"))[0]["norm_eps"] == 1e-4


def test_without_a_size_of_its_own_the_network_draws_at_the_resolution(tmp_path):
    recipe = write(tmp_path / "net.json", {name: value for name, value in NETWORK.items() if name != "sample_size"})
    assert build_pipeline(recipe, 24, 0).unet.config.sample_size == 24


def test_another_dropout_is_another_base_model(tmp_path):
    prints = []
    for dropout in (0.0, 0.1, 0.1):
        model = ModelConfig(model_config=write(tmp_path / "net.json", {**NETWORK, "dropout": dropout}))
        prints.append(load_family(find_pipeline(model), Config(model=model)).fingerprint())
    assert prints[0] != prints[1] == prints[2]


def test_what_cannot_be_a_network_is_refused_in_one_line(tmp_path):
    file = tmp_path / "net.json"
    assert "unknown key `blok_out_channels`" in (message := refusal(file, {"blok_out_channels": [8]}))
    assert "Did you mean `block_out_channels`?" in message
    assert "unknown key `beta` in `scheduler`" in refusal(file, {**NETWORK, "scheduler": {"beta": 1}})
    assert "under `scheduler`, not 5" in refusal(file, {**NETWORK, "scheduler": 5})
    assert "is for a UNet2DConditionModel" in refusal(file, {"_class_name": "UNet2DConditionModel"})
    assert "is for a DDIMScheduler" in refusal(file, {**NETWORK, "scheduler": {"_class_name": "DDIMScheduler"}})
    assert "makes no network" in refusal(file, {**NETWORK, "block_out_channels": [8]})
    assert "not a list" in refusal(file, [1])
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be read: "):
        read_recipe(str(file))
    with pytest.raises(UserError, match="`--model_config cifar` is no file, .* afhq_dog, cifar10, cifar100"):
        read_recipe("cifar")


def test_a_pipeline_and_a_new_network_exclude_each_other():
    with pytest.raises(UserError, match="`--model_config`.*`--pretrained_model_name_or_path sd`"):
        Config.from_flags(model_config="cifar10", pretrained_model_name_or_path="sd")
    with pytest.raises(UserError, match="`--model_config`.*`--revision main`"):
        Config.from_flags(model_config="cifar10", revision="main")
    with pytest.raises(UserError, match="`--pretrained_model_name_or_path` is missing.*`--model_config`"):
        Config.from_flags(train_data_dir="x").check_sources()
    Config.from_flags(model_config="cifar10", train_data_dir="x").check_sources()


def test_on_the_command_line_a_pipeline_takes_the_place_of_the_files_network(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model_config: cifar10\ntrain_data_dir: data\n")
    config = Config.from_command_line(["--config", str(file), "--pretrained_model_name_or_path", "sd"])
    assert config.model == ModelConfig(pretrained_model_name_or_path="sd")
