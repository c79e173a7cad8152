"""`iet-finetune convert`: the update stays what it is under other names; mistakes end in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loras import ATTENTION, assert_same_answers, save_adapter, with_dense
from safetensors.torch import load_file, save_file
from tiny import tiny_sd

from iet_finetune import cli
from iet_finetune.lora.reading import read_lora

ROOT = Path(__file__).parents[2]
NAME = "pytorch_lora_weights.safetensors"
TEXT = ["q_proj", "out_proj", "fc1"]


def convert(*arguments):
    """Runs `iet-finetune convert` in this process."""
    return cli.main(["convert", *map(str, arguments)])


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter whose alpha stands in its header alone, and its dense updates."""
    unet = {"r": 4, "lora_alpha": 3, "target_modules": [*ATTENTION, "conv1"]}
    return tmp_path / "a", save_adapter(
        tmp_path / "a", 1, unet, {"r": 2, "lora_alpha": 4, "target_modules": TEXT, "rank_pattern": {"fc1": 3}}
    )


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_what_is_converted_loads_in_diffusers_and_back_at_the_same_strength(adapter, tmp_path, capsys, form):
    folder, deltas = adapter
    output = tmp_path / "out.safetensors"
    assert convert(folder, "--to", form, "--output", output) == 0
    count = len(deltas)
    assert capsys.readouterr().out == (
        f"Wrote {count} layers under {form}'s names, the scaling of {count} of them now in the matrices: `{output}`.\n"
    )
    names = load_file(output)
    assert all(key.startswith(("lora_unet_", "lora_te_")) == (form == "kohya") for key in names)
    pipeline = tiny_sd()
    pipeline.load_lora_weights(tmp_path, weight_name=output.name)
    assert_same_answers(pipeline, with_dense([deltas], [1.0]))
    other = {"kohya": "diffusers", "diffusers": "kohya"}[form]
    assert convert(output, "--to", other) == 0
    assert convert(tmp_path / f"out_{other}.safetensors", "--to", form) == 0
    assert (tmp_path / f"out_{other}_{form}.safetensors").read_bytes() == output.read_bytes()


def test_the_output_lies_beside_the_input_if_none_is_named(adapter):
    folder, _ = adapter
    before = (folder / NAME).read_bytes()
    assert convert(folder / NAME, "--to", "kohya") == 0
    assert {file.name for file in folder.iterdir()} == {NAME, "pytorch_lora_weights_kohya.safetensors"}
    assert (folder / NAME).read_bytes() == before
    assert len(read_lora(folder / "pytorch_lora_weights_kohya.safetensors")) == len(read_lora(folder / NAME))


WRONG = {
    "no file": (["--to", "kohya"], "LORA"),
    "no format": (["a"], "`--to` is missing: choose diffusers or kohya"),
    "another format": (["a", "--to", "a1111"], "`--to a1111` is not a format"),
    "missing": (["nowhere", "--to", "kohya"], "`nowhere` does not exist"),
    "folder without one": (["empty", "--to", "kohya"], f"`empty` holds no {NAME}"),
    "pickle": (["a.bin", "--to", "kohya"], "`a.bin` is not a .safetensors file"),
    "no LoRA": (["model.safetensors", "--to", "kohya"], "`model.safetensors` is not a LoRA file"),
    "a name in the way": (["a", "--to", "kohya", "--output", "model.safetensors"], "exists already"),
    "no such folder": (["a", "--to", "kohya", "--output", "b/c.safetensors"], "cannot be written in"),
    "another ending": (["a", "--to", "kohya", "--output", "b.bin"], "must end in .safetensors"),
    "a transformer of neither": (["pixart.safetensors", "--to", "kohya"], "`pixart.safetensors`: kohya's format has"),
    "unknown flag": (["a", "--too", "kohya"], "Did you mean `--to`?"),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_a_mistake_ends_in_one_line_and_code_2_and_leaves_nothing(
    adapter, tmp_path, monkeypatch, capsys, arguments, said
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").touch()
    save_file({"conv_in.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    pair = {f"{layer}.lora_A.weight": torch.ones(1, 4), f"{layer}.lora_B.weight": torch.ones(4, 1)}
    save_file(pair, tmp_path / "pixart.safetensors")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert convert(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith("iet-finetune: error: ")
    assert said in shown.err
    assert sorted(tmp_path.rglob("*")) == before


def test_help_and_wrong_arguments_are_answered_without_torch():
    code = """
import sys
from iet_finetune.cli import main
try:
    main(["convert", "--help"])
except SystemExit:
    pass
main(["convert", "nowhere", "--to", "kohya"])
print("torch" in sys.modules, "iet_finetune.cli.convert_command" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False True"
