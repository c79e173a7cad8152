"""An audit reads a LoRA file in any format, from its folder or by its own name."""

import pytest
import torch
from loras import ATTENTION, assert_same_answers, save_adapter, with_dense
from safetensors.torch import load_file, save_file
from tiny import save_tiny_sd
from tiny_families import tiny_pipeline

from iet_finetune import Config, UserError
from iet_finetune.audit.inputs.pipelines import find_subject
from iet_finetune.lora.file import write_lora
from iet_finetune.lora.layer import LoraLayer
from iet_finetune.lora.reading import foreign_tensors, read_lora

NAME = "pytorch_lora_weights.safetensors"
CPU = torch.device("cpu")


def config_for(base):
    return Config.from_flags(pretrained_model_name_or_path=str(base), train_data_dir=".")


@pytest.mark.parametrize("form", ["diffusers", "kohya", "other trainers"])
def test_a_bare_file_is_what_is_audited(tmp_path, form):
    save_tiny_sd(tmp_path / "base")
    deltas = save_adapter(tmp_path / "a", 1, {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION})
    file = tmp_path / "b.safetensors"
    write_lora(file, read_lora(tmp_path / "a" / NAME), "kohya" if form == "kohya" else "diffusers")
    if form == "other trainers":
        ends = {"lora_A": "lora_down", "lora_B": "lora_up"}
        save_file({key.replace(key[-13:-7], ends[key[-13:-7]]): each for key, each in load_file(file).items()}, file)
    subject = find_subject(config_for(tmp_path / "base"), str(file), "model", foreign_tensors).load(CPU)
    assert_same_answers(subject.pipeline, with_dense([deltas], [1.0]))
    assert subject.name == "b.safetensors"


def test_flux_under_bfl_s_names_is_audited_at_its_strength(tmp_path):
    tiny_pipeline("flux dev").save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(96, 2, generator=generator), torch.randn(2, 32, generator=generator)
    name, file = "double_blocks.0.img_attn.qkv", tmp_path / "b.safetensors"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(1.0)}, file)
    subject = find_subject(config_for(tmp_path / "base"), str(file), "model", foreign_tensors).load(CPU)
    attention = subject.pipeline.transformer.transformer_blocks[0].attn
    for layer, rows in zip((attention.to_q, attention.to_k, attention.to_v), (up @ down / 2).split(32), strict=True):
        torch.testing.assert_close(layer.get_delta_weight(layer.active_adapters[0]), rows)


def test_a_file_for_another_base_is_refused_by_name(tmp_path):
    save_tiny_sd(tmp_path / "base")
    layer = LoraLayer(torch.ones(24, 1), torch.ones(1, 24), 1.0)
    write_lora(tmp_path / "b.safetensors", {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": layer})
    stored = find_subject(config_for(tmp_path / "base"), str(tmp_path / "b.safetensors"), "model", foreign_tensors)
    with pytest.raises(UserError, match="b.safetensors`: its LoRA file does not fit the base"):
        stored.load(CPU)


def test_a_bare_file_needs_its_base(tmp_path):
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1, 4)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="is a LoRA file: say with `--pretrained_model_name_or_path`"):
        find_subject(Config.from_flags(train_data_dir="."), str(tmp_path / "b.safetensors"), "model")
