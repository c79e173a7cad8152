"""SDXL, SD 3 and Flux.1 train, whole and by LoRA, come back complete, and draw with nothing but diffusers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from families.text_to_image import (
    LORA,
    build_world,
    call_options,
    config,
    drawn,
    drawn_in_a_fresh_process,
    furthest,
    save_pipeline,
    train,
    validation_picture,
)
from runs import assert_equal, run_until
from safetensors.torch import load_file
from tiny import save_images
from tiny_families import PIPELINES, tiny_pipeline

from iet_finetune import Config, UserError
from iet_finetune.config.settings import ModelConfig
from iet_finetune.families import PipelineSource, family_class, find_pipeline, load_family

ADAPTER = {"use_lora": True, "rank": 2, "learning_rate": 3e-2, "lora_export": "full_rank"}
FUSED = {**ADAPTER, "lora_export": "fuse"}
MODES = ("full", "lora")
FAMILIES = ("sdxl", "sd3", "flux dev", "pixart alpha")
VARIANTS = ("sd3 without t5", "sd35", "flux schnell", "pixart sigma")


def run_family(name: str, world: Path) -> SimpleNamespace:
    """A family's pipeline and images, and one run of each mode."""
    build_world(world, name)
    # diffusers has no LoRA files of PixArt.
    flags = {"full": {}, "lora": FUSED if "pixart" in name else ADAPTER}
    outputs = {mode: train(world, world / mode, **flags[mode]) for mode in MODES}
    denoiser = "unet" if name == "sdxl" else "transformer"
    return SimpleNamespace(world=world, flags=flags, outputs=outputs, denoiser=denoiser)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """The runs of each family by name, with the images that one fresh process draws from them all."""
    folder = tmp_path_factory.mktemp("families")
    families = {name: run_family(name, folder / name) for name in FAMILIES}
    jobs = {}
    for name, runs in families.items():
        base, full, lora = runs.world / "base", runs.outputs["full"], runs.outputs["lora"]
        jobs |= {f"{name} base": (base, None), f"{name} full": (full, None)}
        jobs[f"{name} lora"] = (lora, None) if runs.flags["lora"] == FUSED else (base, lora)
    pictures = drawn_in_a_fresh_process(folder, jobs)
    for name, runs in families.items():
        runs.pictures = {what: pictures[f"{name} {what}"] for what in ("base", *MODES)}
    return families


@pytest.fixture(params=FAMILIES)
def runs(request, families):
    return families[request.param]


def weights(pipeline: Path) -> dict[str, torch.Tensor]:
    """All stored weights, by file and name."""
    files = sorted(pipeline.rglob("*.safetensors"))
    return {
        f"{file.relative_to(pipeline)} {name}": tensor
        for file in files
        if "checkpoint-" not in str(file.relative_to(pipeline))
        for name, tensor in load_file(file).items()
    }


def test_a_fresh_process_draws_what_the_last_round_drew(runs):
    base = runs.pictures["base"]
    for mode, output in runs.outputs.items():
        assert furthest(validation_picture(output, 0), base) <= 1
        assert furthest(validation_picture(output, 2), runs.pictures[mode]) <= 2
        assert furthest(base, runs.pictures[mode]) > 10
        assert len((output / "metrics.jsonl").read_text().splitlines()) == 2


def test_only_the_denoiser_changes_and_all_else_comes_back_bit_for_bit(runs):
    before, after = weights(runs.world / "base"), weights(runs.outputs["full"])
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith(runs.denoiser) for name in changed)
    # The context's last layers have no use in the last block, and a key's bias cancels in the softmax.
    assert len(changed) > 0.8 * sum(name.startswith(runs.denoiser) for name in before)
    assert {tensor.dtype for tensor in before.values()} == {torch.float32, torch.float16, torch.bfloat16}
    folders = (runs.world / "base", runs.outputs["full"])
    indices = [json.loads((folder / "model_index.json").read_text()) for folder in folders]
    assert indices[0] == indices[1]
    for part in ("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler"):
        for file in (runs.world / "base" / part).glob("*"):
            ours = json.loads((runs.outputs["full"] / part / file.name).read_text())
            assert ours == json.loads(file.read_text()), file.name


def test_a_lora_run_leaves_the_adapter_alone_in_names_that_diffusers_and_other_tools_match(runs):
    output = runs.outputs["lora"]
    if runs.flags["lora"] == FUSED:
        assert not (output / LORA).exists()
        return
    assert not (output / "model_index.json").exists()
    names = set(load_file(output / LORA))
    settings = config(runs.world, output)
    layers = load_family(find_pipeline(settings.model), settings).lora_layers
    assert names
    unet = runs.denoiser == "unet"
    assert all(name.startswith("lora_unet_" if unet else f"{runs.denoiser}.") for name in names)
    for layer in layers:
        end = f"_{layer.replace('.', '_')}.lora_down.weight" if unet else f".{layer}.lora_A.weight"
        assert any(name.endswith(end) for name in names), layer


def test_learning_rate_zero_returns_the_same_bits(runs, tmp_path):
    for mode, flags in {"full": {}, "lora": FUSED}.items():
        none = {"validation_prompts": [], "learning_rate": 0.0}
        output = train(runs.world, tmp_path / mode, **{**flags, **none})
        assert_equal(weights(output), weights(runs.world / "base"))


@pytest.mark.parametrize("mode", MODES)
def test_a_run_resumed_in_the_midst_of_a_round_ends_with_the_same_bits(runs, tmp_path, mode):
    run_until(config(runs.world, tmp_path / "cut", **runs.flags[mode]), 5)
    assert not (tmp_path / "cut" / "model_index.json").exists()
    resumed = train(runs.world, tmp_path / "cut", resume_from_checkpoint="latest", **runs.flags[mode])
    assert_equal(weights(resumed), weights(runs.outputs[mode]))


def test_an_adapter_is_trained_in_half_precision_with_checkpointed_activations(runs, tmp_path):
    flags = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    output = train(runs.world, tmp_path / "out", **FUSED, **flags)
    before, after = weights(runs.world / "base"), weights(output)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(runs.denoiser) and after[name].isfinite().all() for name in changed)
    # About as far as in fp32: nothing but rounding is different.
    assert furthest(validation_picture(output, 2), runs.pictures["lora"]) < 60


@pytest.mark.parametrize("name", PIPELINES)
def test_every_weight_of_the_denoiser_gets_a_gradient(name):
    # Ranks that train one clone together would wait for those that do not.
    pipeline = tiny_pipeline(name)
    family = family_class(PipelineSource(None, type(pipeline).__name__, {}, {}), ModelConfig())(pipeline)
    family.place(torch.device("cpu"))
    sizes = torch.tensor([[0, 0, 0, 0, 16, 16]] * 2)
    conditions = family.encode_captions(["a", "b"]) | family.details(sizes, sizes[:, 0])
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    family.predict(noisy, torch.tensor([3, 500]), conditions).square().mean().backward()
    assert [key for key, weight in family.denoiser.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("name", VARIANTS)
def test_the_other_pipelines_of_a_family_train_and_draw(tmp_path, capsys, name):
    world = build_world(tmp_path, name)
    output = train(world, tmp_path / "out")
    told = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3 without t5" else {}
    pipeline = DiffusionPipeline.from_pretrained(output, dtype=torch.float32, **told)
    picture = drawn(pipeline, **call_options(output))
    assert furthest(picture, validation_picture(output, 2)) <= 1
    assert furthest(picture, validation_picture(output, 0)) > 10
    if told:
        # diffusers does not load such a pipeline unless it is told so.
        call = 'from_pretrained("{}", text_encoder_3=None, tokenizer_3=None)'
        assert call.format(output) in capsys.readouterr().out
        assert call.format("this-repository") in (output / "README.md").read_text()
        index = json.loads((output / "model_index.json").read_text())
        assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
        assert not (output / "text_encoder_3").exists()


@pytest.mark.parametrize(("name", "denoiser"), [("sdxl", "unet"), ("sd3", "transformer")])
def test_weights_that_are_cut_into_several_files_are_read_with_their_precisions(tmp_path, name, denoiser):
    whole, cut = save_pipeline(tmp_path / "whole", name), tmp_path / "cut"
    pipeline = DiffusionPipeline.from_pretrained(whole, dtype=torch.float32)
    pipeline.text_encoder_2.to(torch.bfloat16)
    pipeline.save_pretrained(cut, max_shard_size="10KB")
    model = ModelConfig(pretrained_model_name_or_path=str(cut))
    assert list((cut / denoiser).glob("*.index.json"))
    assert list((cut / "text_encoder_2").glob("*.index.json"))
    family = load_family(find_pipeline(model), Config(model=model))
    assert_equal(family.denoiser.state_dict(), tiny_pipeline(name).components[denoiser].state_dict())
    assert find_pipeline(model).dtypes == {
        part: component.dtype
        for part, component in pipeline.components.items()
        if isinstance(component, torch.nn.Module)
    }


def test_a_part_of_two_precisions_comes_back_in_both(tmp_path):
    tiny_pipeline("sd3").save_pretrained(tmp_path / "whole")
    # transformers keeps some of T5's layers in fp32, and so they are saved.
    DiffusionPipeline.from_pretrained(tmp_path / "whole", dtype=torch.float16).save_pretrained(tmp_path / "base")
    save_images(tmp_path / "data", 8)
    before = weights(tmp_path / "base")
    t5 = {tensor.dtype for name, tensor in before.items() if name.startswith("text_encoder_3")}
    assert t5 == {torch.float16, torch.float32}
    train(tmp_path, tmp_path / "out", learning_rate=0.0, validation_prompts=[])
    after = weights(tmp_path / "out")
    assert_equal(after, before)
    assert all(after[name].dtype == before[name].dtype for name in before)
    train(tmp_path, tmp_path / "bf16", save_dtype="bfloat16", validation_prompts=[])
    rounded = weights(tmp_path / "bf16")
    assert {rounded[name].dtype for name in before if name.startswith("transformer")} == {torch.bfloat16}
    assert {rounded[name].dtype for name in before if name.startswith("text_encoder_3")} == t5


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sdxl", {"weighting_scheme": "mode"}),
        ("sdxl", {"logit_std": 0.5}),
        ("sdxl", {"max_sequence_length": 77}),
        ("sdxl", {"guidance_scale": 3.5}),
        ("sd3", {"snr_gamma": 5.0}),
        ("sd3", {"prediction_type": "epsilon"}),
        ("sd3", {"guidance_scale": 3.5}),
        ("sd3", {"max_sequence_length": 513}),
        ("sd3", {"mode_scale": 1.0}),
        ("flux dev", {"logit_mean": 0.5}),
        ("flux dev", {"snr_gamma": 5.0}),
        ("flux dev", {"prediction_type": "v_prediction"}),
        ("flux schnell", {"guidance_scale": 3.5}),
    ],
)
def test_a_flag_that_means_nothing_to_the_family_is_refused_in_one_line(tmp_path, name, flags):
    tiny_pipeline(name).save_pretrained(tmp_path / "base")
    settings = config(tmp_path, tmp_path / "out", **flags)
    with pytest.raises(UserError) as caught:
        load_family(find_pipeline(settings.model), settings)
    ((flag, value),) = flags.items()
    assert str(caught.value).startswith(f"`--{flag} {value}` ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "resolution", "message"),
    [
        ("sdxl", 18, "must be a multiple of 4 for this model: try 16 or 20"),
        ("sd3", 18, "must be a multiple of 4 for this model: try 16 or 20"),
        ("sd3", 28, "more than the 24 that this model can place"),
        ("flux dev", 18, "must be a multiple of 4 for this model: try 16 or 20"),
    ],
)
def test_a_resolution_that_the_model_cannot_take_is_refused(tmp_path, name, resolution, message):
    tiny_pipeline(name).save_pretrained(tmp_path / "base")
    settings = config(tmp_path, tmp_path / "out")
    family = load_family(find_pipeline(settings.model), settings)
    with pytest.raises(UserError, match=f"`--resolution {resolution}` .*{message}"):
        family.latent_shape(resolution)
    assert family.latent_shape(24) == (4, 12, 12)


@pytest.mark.parametrize(
    ("name", "part"), [("sdxl", "text_encoder_2"), ("sd3", "text_encoder"), ("flux dev", "text_encoder_2")]
)
def test_a_pipeline_without_a_part_that_training_needs_is_refused(tmp_path, name, part):
    tiny_pipeline(name).save_pretrained(tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({**index, part: [None, None]}))
    settings = config(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=f"has no {part}"):
        load_family(find_pipeline(settings.model), settings)
