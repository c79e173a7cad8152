"""A checkpoint file in its original layout is the same base as the folder that holds the same weights."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from original_layout import original_layout, save_original
from runs import run_until
from safetensors.torch import load_file, save_file
from tiny import RESOLUTION, save_images, save_tiny_sd, tiny_sd
from tiny_families import tiny_sdxl
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from iet_finetune import Config, Trainer, UserError
from iet_finetune.config.settings import ModelConfig
from iet_finetune.families import (
    family_class,
    find_pipeline,
    load_as_stored,
    load_family,
    save_pipeline,
    source_of,
)
from iet_finetune.families.fingerprint import pipeline_fingerprint
from iet_finetune.families.single_file import stored_parts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pipeline in `base`, the same in `model.safetensors`, and images."""
    folder = tmp_path_factory.mktemp("single")
    pipeline = tiny_sd()
    pipeline.save_pretrained(folder / "base")
    save_original(pipeline, folder / "model.safetensors")
    save_images(folder / "data", 8)
    return folder


def of_file(world: Path, file: str | Path = "model.safetensors", **settings: Any) -> ModelConfig:
    """The file as a base, with the folder as its configuration."""
    given = {"base_config": str(world / "base"), **settings}
    return ModelConfig(pretrained_model_name_or_path=str(world / file), **given)


def config(world: Path, output: Path, **changes: Any) -> Config:
    flags = {
        "train_data_dir": str(world / "data"),
        "output_dir": str(output),
        "resolution": RESOLUTION,
        "num_shards": 2,
        "train_batch_size": 2,
        "num_train_epochs": 1,
        "lr_warmup_steps": 0,
        "learning_rate": 1e-3,
        "report_to": "none",
        **changes,
    }
    return Config.from_flags(**flags)


def files(folder: Path) -> dict[str, bytes]:
    """What a pipeline's folder holds in its components."""
    parts = [part for part in folder.iterdir() if (folder / part.name).is_dir() and "checkpoint" not in part.name]
    names = [file for part in parts for file in part.rglob("*") if file.is_file() and part.name in PARTS]
    return {str(file.relative_to(folder)): file.read_bytes() for file in names}


PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def test_a_file_trains_to_the_same_bits_as_its_folder(world, tmp_path, capfd):
    folder, file = (
        {"pretrained_model_name_or_path": str(world / "base")},
        {
            "pretrained_model_name_or_path": str(world / "model.safetensors"),
            "base_config": str(world / "base"),
        },
    )
    outputs = [Trainer(config(world, tmp_path / name, **base)).train() for name, base in
               (("folder", folder), ("file", file))]  # fmt: skip
    ours, theirs = files(outputs[1]), files(outputs[0])
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    indices = [json.loads((output / "model_index.json").read_text()) for output in outputs]
    assert indices[0] == indices[1]
    card = (outputs[1] / "README.md").read_text() + (outputs[1] / "card.json").read_text()
    assert str(world) not in card
    assert "Fine-tuned from a local pipeline" in card


def test_the_licence_of_the_configuration_is_not_that_of_the_file(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    base = {"pretrained_model_name_or_path": str(world / "model.safetensors"), "base_config": str(tmp_path / "base")}
    output = Trainer(config(world, tmp_path / "out", **base)).train()
    assert json.loads((output / "card.json").read_text())["facts"]["base_license"] is None


def test_a_run_goes_on_from_the_same_weights_and_from_no_others(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    base = {"base_config": str(world / "base"), "resume_from_checkpoint": "latest", "checkpointing_steps": 1}
    base["pretrained_model_name_or_path"] = str(tmp_path / "world" / "model.safetensors")
    run_until(config(world, tmp_path / "out", **base), 2)
    save_original(tiny_sd(seed=1), tmp_path / "world" / "model.safetensors")
    with pytest.raises(UserError, match="the base model has changed"):
        Trainer(config(world, tmp_path / "out", **base)).train()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_is_held_and_saved_in_it(world, tmp_path, dtype):
    file = save_original(tiny_sd(), tmp_path / "half.safetensors", dtype=dtype)
    settings = of_file(world, file)
    source = find_pipeline(settings)
    assert source.dtypes == dict.fromkeys(("unet", "vae", "text_encoder"), dtype)
    pipeline: Any = load_as_stored(source, settings)
    expected = tiny_sd().to(dtype)
    assert pipeline_fingerprint(pipeline) == pipeline_fingerprint(expected)
    assert {tensor.dtype for tensor in pipeline.unet.parameters()} == {dtype}
    save_pipeline(pipeline, tmp_path / "out", source.dtypes, source.own_index)
    saved = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, expected.unet.state_dict()[name]) for name, tensor in saved.items())


def test_components_keep_a_precision_each_and_one_of_several_is_taken_as_fp32(world, tmp_path):
    tensors = {
        name: tensor if name.startswith("first") else tensor.half()
        for name, tensor in original_layout(tiny_sd()).items()
    }
    odd = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    tensors[odd] = torch.full_like(tensors[odd], 1 / 3, dtype=torch.float32)
    save_file(tensors, tmp_path / "mixed.safetensors")
    settings = of_file(world, tmp_path / "mixed.safetensors")
    source = find_pipeline(settings)
    assert source.dtypes == {"unet": torch.float16, "vae": torch.float32, "text_encoder": torch.float32}
    pipeline: Any = load_as_stored(source, settings)
    assert {tensor.dtype for tensor in pipeline.unet.parameters()} == {torch.float16}
    assert torch.equal(pipeline.vae.decoder.conv_in.weight, tiny_sd().vae.decoder.conv_in.weight)
    assert pipeline.text_encoder.final_layer_norm.weight[0] == torch.tensor(1 / 3)


def test_memory_is_counted_from_the_header(world):
    stored = find_pipeline(of_file(world)).stored
    folder = find_pipeline(ModelConfig(pretrained_model_name_or_path=str(world / "base"))).stored
    assert stored.keys() == folder.keys()
    assert {name: part.numbers for name, part in stored.items()} == {name: p.numbers for name, p in folder.items()}
    assert {name: part.own_bytes for name, part in stored.items()} == dict.fromkeys(stored, 0)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says there what is mapped")
def test_weights_stay_mapped_from_the_file(world):
    """What own_bytes of 0 says: a tensor lies where the file is mapped."""
    settings = of_file(world)
    pipeline: Any = load_as_stored(find_pipeline(settings), settings)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for part in ("unet", "vae", "text_encoder"):
        outside = [
            name
            for name, tensor in pipeline.components[part].named_parameters()
            if not any(start <= tensor.data_ptr() < end for start, end in spans)
        ]
        assert outside == [], part


def test_what_the_file_lacks_comes_from_a_whole_pipeline_given_as_its_configuration(world, tmp_path):
    other = tiny_sd(seed=7)
    tensors = {name: t for name, t in original_layout(other).items() if not name.startswith("cond_stage")}
    save_file(tensors, tmp_path / "part.safetensors")
    settings = of_file(world, tmp_path / "part.safetensors")
    source = find_pipeline(settings)
    pipeline: Any = load_as_stored(source, settings)
    assert torch.equal(pipeline.unet.conv_in.weight, other.unet.conv_in.weight)
    own = tiny_sd().text_encoder.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in pipeline.text_encoder.state_dict().items())
    assert any("holds no text_encoder: that of `--base_config` is taken" in note for note in source.notes)


def test_tensors_that_are_not_used_are_counted(world, tmp_path):
    extra = {"model_ema.decay": torch.zeros(1), "model_ema.num_updates": torch.zeros(1)}
    file = save_original(tiny_sd(), tmp_path / "ema.safetensors", extra)
    (note,) = find_pipeline(of_file(world, file)).notes
    assert "2 of " in note
    assert "`model_ema.decay`" in note


def test_sdxl_is_read_with_both_of_its_text_encoders(tmp_path):
    pipeline: Any = tiny_sdxl()
    # diffusers tells the encoders apart by their widths.
    wide = CLIPTextConfig.from_dict({**pipeline.text_encoder_2.config.to_dict(), "hidden_size": 24})
    pipeline.text_encoder_2 = CLIPTextModelWithProjection(wide)
    pipeline.save_pretrained(tmp_path / "base")
    file = save_original(pipeline, tmp_path / "xl.safetensors", dtype=torch.float16)
    settings = ModelConfig(pretrained_model_name_or_path=str(file), base_config=str(tmp_path / "base"))
    source = find_pipeline(settings)
    assert set(source.dtypes.values()) == {torch.float16}
    # Its attention is cut in three, which copies it.
    second = source.stored["text_encoder_2"]
    assert {name for name, part in source.stored.items() if part.own_bytes} == {"text_encoder_2"}
    assert second.own_bytes == 2 * second.numbers
    loaded = load_as_stored(source, settings)
    assert pipeline_fingerprint(loaded) == pipeline_fingerprint(pipeline.to(torch.float16))
    assert source.notes == ()


def test_of_a_transformer_alone_the_rest_is_asked_for():
    bare = {"double_blocks.0.img_attn.norm.key_norm.scale": ("BF16", (4,)), "img_in.weight": ("BF16", (8, 16))}
    classes = {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (part,) = stored_parts(bare, classes).values()
    assert (part.numbers, part.nbytes, part.own_bytes, part.loads_in) == (132, 264, 264, torch.bfloat16)


def test_a_safety_checker_of_the_configuration_is_left_out_and_not_written_down(world, tmp_path):
    base = Path(shutil.copytree(world / "base", tmp_path / "base"))
    index = json.loads((base / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (base / "model_index.json").write_text(json.dumps(index))
    for part, file in (("safety_checker", "config.json"), ("feature_extractor", "preprocessor_config.json")):
        (base / part).mkdir()
        (base / part / file).write_text("{}")
    settings = of_file(world, base_config=str(base))
    source = find_pipeline(settings)
    save_pipeline(load_as_stored(source, settings), tmp_path / "out", source.dtypes, source.own_index)
    saved = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert saved["safety_checker"] == [None, None]
    assert saved["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    assert not (tmp_path / "out" / "safety_checker").exists()
    again = ModelConfig(pretrained_model_name_or_path=str(tmp_path / "out"))
    load_as_stored(find_pipeline(again), again)


def stripped(folder: Path) -> Path:
    """The configuration without weights, as the Hub gives it."""
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


def first_layer(channels: int) -> dict[str, torch.Tensor]:
    return {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, channels, 3, 3)}


def written(text: bytes):
    def write(folder: Path) -> Path:
        (folder / "x.safetensors").write_bytes(text)
        return folder / "x.safetensors"

    return write


def of_tensors(tensors: dict[str, torch.Tensor]):
    def write(folder: Path) -> Path:
        save_file(tensors, folder / "x.safetensors")
        return folder / "x.safetensors"

    return write


def changed(tensors: dict[str, torch.Tensor]):
    return lambda folder: save_original(tiny_sd(), folder / "x.safetensors", tensors)


def pickled(folder: Path) -> Path:
    torch.save({"state_dict": original_layout(tiny_sd())}, folder / "x.ckpt")
    return folder / "x.ckpt"


def without(start: str):
    kept = {name: tensor for name, tensor in original_layout(tiny_sd()).items() if not name.startswith(start)}
    return of_tensors(kept)


REFUSED = {
    "a pickle": (pickled, {}, ["x.ckpt` is a pickle", "safetensors"]),
    "no file": (lambda folder: folder / "y.safetensors", {}, ["y.safetensors`", "no such file"]),
    "no file beside": (lambda _: Path("models/x.safetensors"), {}, ["no such file"]),
    "another file": (lambda _: Path(__file__), {}, ["test_single_file.py` is no .safetensors file"]),
    "a damaged file": (written(b"\x08\0\0\0\0\0\0\0{}"), {}, ["x.safetensors` is damaged", "anew"]),
    "a LoRA file": (of_tensors({"lora_unet_x.lora_up.weight": torch.zeros(1)}), {}, ["is a LoRA file, not a base"]),
    "another layout": (of_tensors({"conv_in.weight": torch.zeros(1)}), {}, ["in its original layout"]),
    "a quantized file": (changed({"scaled_fp8": torch.zeros(1)}), {}, ["is quantized", "`scaled_fp8`"]),
    "inpainting": (changed(first_layer(9)), {}, ["is an inpainting model", "takes 9 channels", "text-to-image model"]),
    "editing": (changed(first_layer(8)), {}, ["is no text-to-image model", "takes 8 channels"]),
    "no configuration": (changed({}), {"base_config": None}, ["looks like stable-diffusion-v1-5/", "`--base_config`"]),
    "no such configuration": (changed({}), {"base_config": "owner/x"}, ["`--base_config owner/x` is no folder"]),
    "a file as configuration": (changed({}), {"base_config": __file__}, ["`--base_config", "is a file"]),
    "a variant": (changed({}), {"variant": "fp16"}, ["`--variant fp16` does nothing"]),
    "a missing tensor": (without("model.diffusion_model.out.0"), {}, ["lacks tensors that the configuration asks"]),
    "a bigger model": (
        changed({"model.diffusion_model.middle_block.1.transformer_blocks.1.norm1.weight": torch.zeros(32)}),
        {},
        ["its unet has ", "room for ", "`--base_config`"],
    ),
    "a missing tensor of the text encoder": (
        without("cond_stage_model.transformer.text_model.final"),
        {},
        ["has no text_encoder.final_layer_norm."],
    ),
    "another shape": (changed({"first_stage_model.quant_conv.bias": torch.zeros(3)}), {}, ["could not be loaded"]),
}


@pytest.mark.parametrize(("make", "settings", "said"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_be_taken_is_refused_in_one_line(world, tmp_path, make, settings, said):
    model = of_file(world, make(tmp_path), **settings)
    with pytest.raises(UserError) as error:
        load_as_stored(find_pipeline(model), model)
    assert all(words in str(error.value) for words in said), error.value
    assert "\n" not in str(error.value)


def test_a_component_that_is_nowhere_is_named(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    stripped(tmp_path / "base")
    model = of_file(world, without("cond_stage")(tmp_path), base_config=str(tmp_path / "base"))
    with pytest.raises(UserError, match="holds no text_encoder: give the folder of a whole pipeline"):
        find_pipeline(model)


def test_a_configuration_is_for_a_file_alone(world):
    model = ModelConfig(pretrained_model_name_or_path=str(world / "base"), base_config=str(world / "base"))
    with pytest.raises(UserError, match="`--base_config .*leave it out"):
        find_pipeline(model)


def test_no_weight_is_read_from_a_file_to_find_it(world, tmp_path):
    """Only the header: a file whose numbers are cut off by a hole on disk is found at once."""
    file = tmp_path / "model.safetensors"
    shutil.copy(world / "model.safetensors", file)
    length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    size = file.stat().st_size
    os.truncate(file, length)
    os.truncate(file, size)
    assert find_pipeline(of_file(world, file)).dtypes["unet"] == torch.float32


def with_class(folder: Path, name: str, **settings: Any) -> Path:
    """A pipeline's folder whose model_index.json names another class."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": name} | settings))
    return folder


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_a_class_that_draws_from_a_picture_is_trained_as_the_text_to_image_model_that_it_holds(world, tmp_path, name):
    base = with_class(Path(shutil.copytree(world / "base", tmp_path / "base")), name)
    runs = {"plain": world / "base", "picture": base}
    flags = {"validation_prompts": ["thing 1"], "num_validation_images": 1, "validation_inference_steps": 2}
    outputs = {
        run: Trainer(config(world, tmp_path / run, pretrained_model_name_or_path=str(folder), **flags)).train()
        for run, folder in runs.items()
    }
    assert files(outputs["picture"]) == files(outputs["plain"])
    index = json.loads((outputs["picture"] / "model_index.json").read_text())
    before = json.loads((base / "model_index.json").read_text())
    assert index == before
    card = (outputs["picture"] / "README.md").read_text()
    assert "AutoPipelineForText2Image.from_pretrained(" in card
    again = ModelConfig(pretrained_model_name_or_path=str(outputs["picture"]))
    assert find_pipeline(again).saved_as == name
    assert type(AutoPipelineForText2Image.from_pretrained(outputs["picture"])) is StableDiffusionPipeline


def test_a_denoiser_that_takes_more_than_the_noisy_image_is_refused_by_name(tmp_path):
    folder = save_tiny_sd(tmp_path / "base")
    config_file = folder / "unet" / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"in_channels": 9}))
    for name in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"):
        model = ModelConfig(pretrained_model_name_or_path=str(with_class(folder, name)))
        with pytest.raises(UserError, match=f"{folder}` is an inpainting model: its unet takes 9 channels"):
            family_class(find_pipeline(model), model)


def test_a_pipeline_in_memory_that_is_none_of_text_alone_is_refused(tmp_path):
    pipeline = tiny_sd()
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, in_channels=9)
    with pytest.raises(UserError, match="the pipeline is an inpainting model"):
        load_family(source_of(pipeline), Config(), pipeline)
    other = StableDiffusionImg2ImgPipeline(**tiny_sd().components, requires_safety_checker=False)
    with pytest.raises(UserError, match=r"StableDiffusionPipeline.from_pipe\(pipeline\)"):
        family_class(source_of(other), ModelConfig())


def test_the_refiner_of_sdxl_is_refused_by_name(world, tmp_path):
    folder = Path(shutil.copytree(world / "base", tmp_path / "base"))
    with_class(folder, "StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=True)
    model = ModelConfig(pretrained_model_name_or_path=str(folder))
    with pytest.raises(UserError, match="refiner: give the base model of SDXL"):
        family_class(find_pipeline(model), model)


def test_a_base_with_files_of_one_variant_alone_is_taken_and_said(tmp_path):
    tiny_sd().to(torch.float16).save_pretrained(tmp_path / "base", variant="fp16")
    model = ModelConfig(pretrained_model_name_or_path=str(tmp_path / "base"))
    source = find_pipeline(model)
    assert source.notes == (f"`--pretrained_model_name_or_path {tmp_path / 'base'}` has its weights as the variant "
                            "fp16 alone, which is taken",)  # fmt: skip
    asked = ModelConfig(pretrained_model_name_or_path=str(tmp_path / "base"), variant="fp16")
    assert find_pipeline(asked).notes == ()
    ours, theirs = load_as_stored(source, model), load_as_stored(find_pipeline(asked), asked)
    assert pipeline_fingerprint(ours) == pipeline_fingerprint(theirs)
    assert set(source.dtypes.values()) == {torch.float16}


def test_several_variants_are_not_chosen_from(tmp_path):
    for variant in ("fp16", "other"):
        tiny_sd().save_pretrained(tmp_path / "base", variant=variant)
    with pytest.raises(UserError, match="as variants only \\(fp16, other\\): choose one with `--variant`"):
        find_pipeline(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "base")))
