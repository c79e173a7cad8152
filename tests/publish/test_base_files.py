"""A fused pipeline made from its base's files is the one that comes of loading all of it, bit for bit."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from lora.test_adapters import drawn
from safetensors.torch import load_file, save_file
from tiny import tiny_sd

from iet_finetune import Config, UserError
from iet_finetune.config.settings import ModelConfig
from iet_finetune.ensemble.trainable import Trainable
from iet_finetune.families import find_pipeline, load_family
from iet_finetune.lora.adapters import add_adapter
from iet_finetune.lora.spectra import LowRank
from iet_finetune.publish import result
from iet_finetune.publish.base_files import are_plain, take_over

UNET = "diffusion_pytorch_model"


def trained(folder, half=None, **flags):
    """A run's result: an adapter on a pipeline in `folder`, with remainders below its first layers."""
    settings = {"pretrained_model_name_or_path": str(folder), "train_data_dir": "none", "output_dir": "none"}
    config = Config.from_flags(**settings, use_lora=True, rank=2, lora_export="fuse", **flags)
    source = find_pipeline(config.model)
    family = load_family(source, config)
    adapter = add_adapter(family.denoiser, config.adapter, family.lora_layers, 0)
    if half is not None:
        adapter.round_frozen(half)
    else:
        family.denoiser.float()
    trainable = Trainable(family.denoiser, buffers=False)
    trainable.load(drawn(trainable.tensors, 1))
    generator = torch.Generator().manual_seed(2)
    remainders = {}
    for name, layer in list(adapter.layers.items())[:4]:
        m, n = layer.weight.flatten(1).shape
        remainders[name] = LowRank(torch.randn(m, 3, generator=generator), torch.randn(3, n, generator=generator))
    adapter.fold_remainders(remainders)
    return result.Result(family, adapter, source, False, Accelerator(cpu=True), config)


def halves(folder, **settings):
    """A pipeline in fp16 whose UNet and text encoder keep some tensors in fp32."""
    tiny_sd().to(torch.float16).save_pretrained(folder, **settings)
    for part in ("unet", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            tensors = {name: t.float() if ".norm" in name else t for name, t in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt", "origin": "test"})
    return folder


# What is in the folder, the precision that frozen layers are held in, and the flags.
BASES = {
    "fp32": ({}, None, {}),
    "fp32, trained in bf16": ({}, torch.bfloat16, {}),
    "halves": ({"half": True}, torch.bfloat16, {}),
    "halves in shards of a variant": ({"half": True, "variant": "fp16", "max_shard_size": "100KB"}, None, {}),
    "a variant, saved in fp32": ({"half": True, "variant": "fp16"}, torch.float16, {"save_dtype": "float32"}),
    "shards, saved in bf16": ({"half": True, "max_shard_size": "100KB"}, None, {"save_dtype": "bfloat16"}),
}


@pytest.mark.parametrize(("stored", "half", "flags"), BASES.values(), ids=BASES)
def test_it_has_the_bits_of_the_one_that_was_loaded_whole(tmp_path, monkeypatch, stored, half, flags):
    stored = dict(stored)
    make = halves if stored.pop("half", False) else lambda folder, **how: tiny_sd().save_pretrained(folder, **how)
    make(tmp_path / "base", **stored)
    run = trained(tmp_path / "base", half, prediction_type="v_prediction", **flags)
    with monkeypatch.context() as patched:
        patched.setattr(result, "load_as_stored", None)
        patched.setattr(result, "save_pipeline", None)
        run.save(tmp_path / "streamed")
    monkeypatch.setattr(result.Result, "_base_is_there", lambda self: False)
    run.save(tmp_path / "whole")
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (tensors_of(tmp_path / name / part) for name in ("streamed", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(
            ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor) for name, tensor in theirs.items()
        )
    assert files_of(tmp_path / "streamed") == plain(files_of(tmp_path / "base"), stored.get("variant"))
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "streamed")
    assert {module.dtype for module in (loaded.unet, loaded.vae, loaded.text_encoder)} == {torch.float32}
    theirs = tensors_of(tmp_path / "whole" / "unet")
    assert all(torch.equal(tensor, theirs[name].float()) for name, tensor in loaded.unet.state_dict().items())


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def plain(names, variant):
    return names if variant is None else sorted(name.replace(f".{variant}", "") for name in names)


def test_files_that_keep_their_dtypes_keep_their_headers_and_indexes_too(tmp_path):
    halves(tmp_path / "base", max_shard_size="100KB")
    trained(tmp_path / "base").save(tmp_path / "out")
    (index,) = (tmp_path / "out" / "unet").glob("*.index.json")
    assert index.read_bytes() == (tmp_path / "base" / "unet" / index.name).read_bytes()
    shards = sorted((tmp_path / "out" / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        ours, theirs = shard.read_bytes(), (tmp_path / "base" / "unet" / shard.name).read_bytes()
        end = 8 + int.from_bytes(ours[:8], "little")
        assert ours[:end] == theirs[:end]
        assert b'"origin":"test"' in ours[:end]


def test_only_what_belongs_to_the_chosen_weights_is_taken(tmp_path):
    base = tmp_path / "base"
    tiny_sd().save_pretrained(base)
    tiny_sd(seed=1).save_pretrained(tmp_path / "other", variant="fp16")
    shutil.copytree(tmp_path / "other", base, dirs_exist_ok=True)
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (base / "vae" / "evil.py").write_text("1/0")
    settings = json.loads((base / "text_encoder" / "config.json").read_text())
    settings |= {"torch_dtype": "float16", "_name_or_path": "/home/somebody"}
    (base / "text_encoder" / "config.json").write_text(json.dumps(settings))
    trained(base).save(tmp_path / "out")
    names = [path.rpartition("/")[2] for path in files_of(tmp_path / "out")]
    assert not [name for name in names if "fp16" in name or name.endswith((".bin", ".py"))]
    written = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert written["torch_dtype"] == "float32"
    assert "_name_or_path" not in written
    before = [(base / "vae" / f"{UNET}.safetensors").read_bytes(), (tmp_path / "out/vae" / f"{UNET}.safetensors")]
    assert before[0] == before[1].read_bytes()
    assert not before[1].is_symlink()


@pytest.mark.parametrize("change", ["pickled", "another tensor", "flat", "gone"])
def test_where_the_files_do_not_hold_the_model_as_it_is_it_is_saved_whole(tmp_path, monkeypatch, change):
    base = tmp_path / "base"
    tiny_sd().save_pretrained(base, safe_serialization=change != "pickled")
    if change == "another tensor":
        file = base / "unet" / f"{UNET}.safetensors"
        save_file({**load_file(file), "left.over": torch.zeros(1)}, file, metadata={"format": "pt"})
    run = trained(base)
    if change == "gone":
        shutil.rmtree(base / "unet")
    if change == "flat":
        monkeypatch.setattr("iet_finetune.publish.base_files.part_folder", lambda folder, name: folder)
    assert not run._base_is_there()
    run.save(tmp_path / "out")
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").unet is not None
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_a_base_that_is_damaged_in_the_meantime_is_named(tmp_path):
    tiny_sd().save_pretrained(tmp_path / "base")
    source = find_pipeline(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "base")))
    assert are_plain(source)
    (tmp_path / "base" / "unet" / f"{UNET}.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"unet` cannot be read"):
        take_over(source, tmp_path / "out", {"unet": lambda name, tensor: tensor})
