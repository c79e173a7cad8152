"""`iet-finetune merge` of whole pipelines: the mean bit for bit, and what does not fit is refused."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from merging import WEIGHTS, merge, the_line
from safetensors.torch import load_file, save_file
from tiny import save_tiny_sd, tiny_sd

from iet_finetune import merge_state_dicts


def sharded(folder, seed, size="20KB"):
    """A pipeline whose UNet is cut into several files."""
    pipeline = tiny_sd(seed=seed)
    pipeline.save_pretrained(folder)
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    pipeline.unet.save_pretrained(folder / "unet", max_shard_size=size)
    return folder


@pytest.mark.parametrize(
    "save", [lambda folder, seed: save_tiny_sd(folder, seed=seed), sharded], ids=["one", "shards"]
)
def test_whole_pipelines_merge_bit_for_bit_as_state_dicts_do_and_draw(tmp_path, save, capsys):
    folders = [save_tiny_sd(tmp_path / "a", seed=1), save(tmp_path / "b", seed=2), save(tmp_path / "c", seed=3)]
    capsys.readouterr()  # the progress bars of saving
    assert merge(*reversed(folders), "--weights", 5, 3, 2, "--output", tmp_path / "out") == 0
    assert the_line(capsys) == (
        "Merged 3 pipelines, in shares of 0.5, 0.3, 0.2. "
        f"Load it with DiffusionPipeline.from_pretrained({str(tmp_path / 'out')!r})."
    )
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    states = [tiny_sd(seed=seed).unet.state_dict() for seed in (3, 2, 1)]
    expected = merge_state_dicts(states, [5, 3, 2])
    assert merged.unet.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.unet.state_dict().items())
    first = tiny_sd(seed=3)
    for name, tensor in merged.text_encoder.state_dict().items():
        assert torch.equal(tensor, first.text_encoder.state_dict()[name])
    first.unet.load_state_dict(expected)
    draw = {"num_inference_steps": 2, "output_type": "np"}
    pictures = [
        pipeline("a cat", generator=torch.Generator().manual_seed(0), **draw).images for pipeline in (merged, first)
    ]
    np.testing.assert_array_equal(*pictures)
    source = folders[-1] / "unet"
    assert {path.name for path in (tmp_path / "out" / "unet").iterdir()} == {path.name for path in source.iterdir()}


def test_only_what_belongs_to_the_pipeline_is_copied(tmp_path):
    folders = [save_tiny_sd(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    (folders[0] / "checkpoint-8").mkdir()
    (folders[0] / "metrics.jsonl").touch()
    (folders[0] / "unet" / "diffusion_pytorch_model.bin").touch()
    before = {path.name for path in (folders[1]).iterdir()}
    assert merge(*folders, "--output", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in (tmp_path / "out" / "unet").iterdir()} == {"config.json", WEIGHTS}


def test_denoisers_alone_merge_in_the_first_one_s_dtype(tmp_path, capsys):
    unets = [tiny_sd(seed=seed).unet for seed in range(2)]
    unets[0].half().save_pretrained(tmp_path / "a")
    unets[1].save_pretrained(tmp_path / "b")
    (tmp_path / "out").mkdir()
    assert merge(tmp_path / "a", tmp_path / "b", "--output", tmp_path / "out") == 0
    assert f"Load it with UNet2DConditionModel.from_pretrained({str(tmp_path / 'out')!r})." in the_line(capsys)
    expected = merge_state_dicts([unet.state_dict() for unet in unets])
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(tensor.dtype == torch.float16 for tensor in load_file(tmp_path / "out" / WEIGHTS).values())
    assert all(torch.equal(merged[name].half(), tensor) for name, tensor in expected.items())


def test_equal_pipelines_merge_to_the_same_file(tmp_path):
    folder = save_tiny_sd(tmp_path / "a")
    assert merge(folder, folder, folder, "--weights", 1200, 800, 7, "--output", tmp_path / "out") == 0
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes()


def test_tensors_that_are_no_floats_come_from_the_first(tmp_path):
    config = {"_class_name": "Net", "width": 2}
    for name, value in (("a", 1), ("b", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"_name_or_path": name}))
        tensors = {"w": torch.full((3, 2), value).bfloat16(), "n": torch.tensor(value), "none": torch.zeros(0, 4)}
        save_file(tensors | {"flag": torch.tensor([value == 1])}, tmp_path / name / WEIGHTS, metadata={"format": "pt"})
    assert merge(tmp_path / "a", tmp_path / "b", "--output", tmp_path / "out") == 0
    merged = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(merged["w"], torch.full((3, 2), 3.0).bfloat16())
    assert (merged["n"].item(), merged["flag"].item(), merged["none"].shape) == (1, True, (0, 4))


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def another_class(folder):
    edit_json(folder / "unet" / "config.json", _class_name="UNet2DModel")


def another_width(folder):
    edit_json(folder / "unet" / "config.json", cross_attention_dim=32)


def quantized(folder):
    edit_json(folder / "unet" / "config.json", quantization_config={"quant_method": "x"})


def no_config(folder):
    (folder / "unet" / "config.json").unlink()


def a_variant(folder):
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")


def damaged(folder):
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])


def one_tensor_less(folder):
    path = folder / "unet" / WEIGHTS
    save_file({k: v for k, v in load_file(path).items() if k != "conv_in.bias"}, path)


def another_shape(folder):
    path = folder / "unet" / WEIGHTS
    save_file(load_file(path) | {"conv_in.bias": torch.zeros(3)}, path)


def another_denoiser(folder):
    edit_json(folder / "model_index.json", unet=[None, None], transformer=["diffusers", "X"])


def no_json(folder):
    (folder / "model_index.json").write_text("[]")


def half_a_shard_index(folder):
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))


CHANGES = {
    another_class: "has _class_name UNet2DModel, but",
    another_width: "has cross_attention_dim 32, but",
    quantized: "is quantized",
    no_config: "config.json` cannot be read",
    a_variant: "without a variant",
    damaged: "is not a safetensors file",
    one_tensor_less: "does not have the tensor `conv_in.bias`",
    another_shape: "`conv_in.bias` has shape (3,)",
    another_denoiser: "must have a unet",
    no_json: "must hold a JSON object",
    half_a_shard_index: "b.safetensors` is missing",
}


@pytest.mark.parametrize(("change", "said"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_pipelines_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path, capsys, change, said):
    folders = [save_tiny_sd(tmp_path / name) for name in "ab"]
    change(folders[1])
    (tmp_path / "out").mkdir()
    capsys.readouterr()  # the progress bars of saving
    assert merge(*folders, "--output", tmp_path / "out") == 2
    line = the_line(capsys, "err")
    assert said in line
    assert str(folders[1]) in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_first_pipeline_that_lacks_a_component_is_refused(tmp_path, capsys):
    folders = [save_tiny_sd(tmp_path / name) for name in "ab"]
    (folders[0] / "vae").rename(tmp_path / "vae")
    capsys.readouterr()  # the progress bars of saving
    assert merge(*folders, "--output", tmp_path / "out") == 2
    assert "names vae, but it is missing" in the_line(capsys, "err")
    assert not (tmp_path / "out").exists()


def test_what_an_interrupted_merge_left_is_removed(tmp_path):
    folders = [save_tiny_sd(tmp_path / name) for name in "ab"]
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "rest").touch()
    assert merge(*folders, "--output", tmp_path / "out") == 0
    assert not (tmp_path / ".out.partial").exists()
    assert not (tmp_path / "out" / "rest").exists()
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").unet is not None
