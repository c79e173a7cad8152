"""`iet-finetune merge`: what it writes loads in diffusers and is the weighted mean; mistakes end in one line."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from loras import EVERYTHING, TEXT, answers, assert_same_answers, save_adapter, with_dense
from merging import LOW, NAME, merge, the_line
from safetensors.torch import load_file, save_file
from tiny import save_tiny_sd, tiny_sd

from iet_finetune import cli, merge_state_dicts
from iet_finetune.families.tiny import save_tiny_pipeline
from iet_finetune.lora.reading import read_lora

ROOT = Path(__file__).parents[2]
CONVOLUTIONS = {
    "r": 3,
    "lora_alpha": 2,
    "use_rslora": True,
    "target_modules": EVERYTHING,
    "rank_pattern": {"conv1": 2},
}
PLAIN = {"r": 5, "lora_alpha": 5, "target_modules": EVERYTHING}
ON_TEXT = {"r": 2, "lora_alpha": 3, "target_modules": TEXT}
ON_MORE_TEXT = {"r": 3, "lora_alpha": 1, "target_modules": ["q_proj", "fc2"]}


@pytest.fixture
def adapters(tmp_path):
    """Three adapters of one base with ranks, scalings and layers of their own: their paths and dense updates."""
    updates = [
        save_adapter(tmp_path / "a", 1, LOW, ON_TEXT),
        save_adapter(tmp_path / "b", 2, CONVOLUTIONS, ON_MORE_TEXT),
        save_adapter(tmp_path / "c", 3, PLAIN, header=False),
    ]
    return [tmp_path / "a", tmp_path / "b" / NAME, tmp_path / "c"], updates


def test_a_merged_lora_is_base_plus_the_weighted_updates(adapters, tmp_path, capsys):
    paths, updates = adapters
    assert merge(*paths, "--weights", 0.5, 0.3, 0.2, "--output", tmp_path / "out") == 0
    line = the_line(capsys)
    assert line == (
        "Merged 3 LoRA files, in shares of 0.5, 0.3, 0.2: ranks 2 to 12, exact. "
        f"Load it with pipeline.load_lora_weights({str(tmp_path / 'out')!r})."
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [NAME]
    pipeline, base = tiny_sd(), answers(tiny_sd())
    pipeline.load_lora_weights(tmp_path / "out")
    expected = with_dense(updates, [0.5, 0.3, 0.2])
    assert_same_answers(pipeline, expected)
    assert all((one - other).abs().max() > 0.1 for one, other in zip(answers(expected), base, strict=True))


@pytest.mark.parametrize(("given", "shares"), [([], [1 / 3] * 3), (["--weights", 30, 10, 60], [0.3, 0.1, 0.6])])
def test_weights_are_equal_or_divided_by_their_sum(adapters, tmp_path, given, shares):
    paths, updates = adapters
    assert merge(*paths, *given, "--output", tmp_path / "out") == 0
    pipeline = tiny_sd()
    pipeline.load_lora_weights(tmp_path / "out")
    assert_same_answers(pipeline, with_dense(updates, shares))


def test_files_under_kohya_s_names_merge_to_their_dense_updates(tmp_path):
    settings = {"r": 4, "lora_alpha": 4, "target_modules": EVERYTHING}
    updates = [save_adapter(tmp_path / name, seed, settings) for seed, name in enumerate("ab")]
    for name, alpha in (("a", 1.0), ("b", 6.0)):
        kohya = convert_state_dict_to_kohya(load_file(tmp_path / name / NAME))
        alphas = {key: torch.tensor(alpha) for key in kohya if key.endswith(".alpha")}
        assert len(alphas) == len(updates[0])
        save_file({k: v.contiguous() for k, v in (kohya | alphas).items()}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    assert merge(*files, "--weights", 3, 1, "--output", tmp_path / "out") == 0
    merged = read_lora(tmp_path / "out" / NAME)
    assert merged.keys() == updates[0].keys()
    for name, layer in merged.items():
        expected = 0.75 * 1 / 4 * updates[0][name] + 0.25 * 6 / 4 * updates[1][name]
        torch.testing.assert_close(
            layer.update().dense().float().view(expected.shape), expected, rtol=1e-6, atol=1e-6 * expected.abs().max()
        )


def test_what_is_merged_can_be_merged_again(adapters, tmp_path):
    paths, updates = adapters
    assert merge(*paths[:2], "--output", tmp_path / "two") == 0
    assert merge(tmp_path / "two", paths[2], "--weights", 2, 1, "--output", tmp_path / "out") == 0
    pipeline = tiny_sd()
    pipeline.load_lora_weights(tmp_path / "out")
    assert_same_answers(pipeline, with_dense(updates, [1 / 3] * 3))


def test_equal_adapters_are_unchanged(adapters, tmp_path, capsys):
    (first, *_), (update, *_) = adapters
    assert merge(first, first, first, "--weights", 1, 5, 2, "--output", tmp_path / "out") == 0
    assert "ranks 2 to 4, exact." in the_line(capsys)
    pipeline = tiny_sd()
    pipeline.load_lora_weights(tmp_path / "out")
    assert_same_answers(pipeline, with_dense([update], [1.0]))


def test_a_rank_cuts_and_says_what_is_lost(adapters, tmp_path, capsys):
    paths, updates = adapters
    assert merge(*paths, "--rank", 3, "--output", tmp_path / "out") == 0
    line = the_line(capsys)
    layers = read_lora(tmp_path / "out" / NAME)
    assert {layer.rank for layer in layers.values()} == {2, 3}
    lost, whole = {}, {}
    for name, layer in layers.items():
        module = name.replace("text_model.", "")
        exact = sum(deltas[module].double() / 3 for deltas in updates if module in deltas).flatten(1)
        lost[name] = (exact - layer.update().dense()).square().sum().item()
        whole[name] = exact.square().sum().item()
    worst = max(lost, key=lambda name: lost[name] / whole[name])
    share = sum(lost.values()) / sum(whole.values())
    assert f"which loses {share:.2%} of the update's energy ({lost[worst] / whole[worst]:.2%} in {worst})" in line
    assert 0.01 < share < 0.9


def test_a_rank_that_is_enough_is_exact(adapters, tmp_path, capsys):
    paths, _ = adapters
    assert merge(*paths, "--rank", 12, "--output", tmp_path / "out") == 0
    assert "ranks 2 to 12, exact." in the_line(capsys)


@pytest.mark.parametrize("how", ["fp32", "halves in shards of a variant", "pickled"])
def test_with_a_base_the_result_is_this_pipeline_with_the_updates_in_its_weights(adapters, tmp_path, capsys, how):
    paths, updates = adapters
    variant, half = ("fp16" if "variant" in how else None), torch.float16 if "halves" in how else torch.float32
    settings = {"variant": variant, "safe_serialization": how != "pickled"}
    tiny_sd().to(half).save_pretrained(tmp_path / "base", **settings, max_shard_size="100KB" if variant else "10GB")
    capsys.readouterr()  # the progress bars of saving
    given = [*paths, "--weights", 5, 3, 2, "--base", tmp_path / "base", "--output", tmp_path / "out"]
    assert merge(*given) == 0
    assert the_line(capsys) == (
        f"Merged 3 LoRA files, in shares of 0.5, 0.3, 0.2, into {tmp_path / 'base'}: ranks 2 to 12, exact. "
        f"Load it with DiffusionPipeline.from_pretrained({str(tmp_path / 'out')!r})."
    )
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    stored = {
        name: t for file in (tmp_path / "out" / "unet").glob("*.safetensors") for name, t in load_file(file).items()
    }
    assert {tensor.dtype for tensor in stored.values()} == {half}
    assert (len(list((tmp_path / "out" / "unet").glob("*.safetensors"))) > 1) == (variant is not None)
    if half == torch.float32:
        assert_same_answers(pipeline, with_dense(updates, [0.5, 0.3, 0.2]))
    else:
        base = tiny_sd().to(half).to(torch.float32)
        for name, tensor in stored.items():
            expected = base.unet.state_dict()[name].double()
            layer = f"unet.{name.removesuffix('.weight')}"
            for deltas, share in zip(updates, [0.5, 0.3, 0.2], strict=True):
                expected = expected + share * deltas.get(layer, torch.zeros(()))
            torch.testing.assert_close(tensor.double(), expected, rtol=2**-10, atol=1e-6)
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "c", "out"]


def test_a_base_that_the_adapter_is_not_for_is_refused_and_nothing_is_left(adapters, tmp_path, capsys):
    paths, _ = adapters
    save_tiny_sd(tmp_path / "base")
    wide = tiny_sd()
    wide.unet = UNet2DConditionModel.from_config(dict(wide.unet.config) | {"block_out_channels": (32, 64)})
    wide.save_pretrained(tmp_path / "wide")
    save_tiny_pipeline("FluxPipeline", tmp_path / "flux")
    wrong = {
        "wide": "but the adapter is for",
        "flux": "has no layer unet.",
        "nowhere/at/all": "`--base nowhere/at/all`: there is no such folder.",
        "base/unet": "is not a diffusers pipeline",
    }
    capsys.readouterr()
    for name, said in wrong.items():
        base = name if name.startswith("nowhere") else tmp_path / name
        assert merge(paths[0], "--base", base, "--output", tmp_path / "out") == 2
        assert said in the_line(capsys, "err")
        assert not (tmp_path / "out").exists()
    assert merge(tmp_path / "base", tmp_path / "wide", "--base", tmp_path / "base", "--output", tmp_path / "out") == 2
    assert "`--base` is for LoRA files" in the_line(capsys, "err")


def test_a_merged_lora_loads_in_a_fresh_process(adapters, tmp_path):
    paths, updates = adapters
    save_tiny_sd(tmp_path / "base")
    assert merge(*paths, "--output", tmp_path / "out") == 0
    code = """
import sys, torch
from diffusers import DiffusionPipeline
from loras import answers
folder = sys.argv[1]
pipeline = DiffusionPipeline.from_pretrained(f"{folder}/base")
pipeline.load_lora_weights(f"{folder}/out")
torch.save(answers(pipeline), f"{folder}/answers.pt")
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = processes.run(command, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")})
    assert done.returncode == 0, done.stderr
    expected = answers(with_dense(updates, [1 / 3] * 3))
    for one, other in zip(torch.load(tmp_path / "answers.pt"), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture
def world(tmp_path):
    """A folder with one of everything, right and wrong."""
    save_adapter(tmp_path / "lora", 1, LOW)
    save_adapter(tmp_path / "other", 2, LOW)
    save_tiny_sd(tmp_path / "pipeline")
    save_tiny_sd(tmp_path / "second", seed=1)
    changes = {
        "wide": {key: tensor.repeat(1, 2) for key, tensor in load_file(tmp_path / "lora" / NAME).items()},
        "flux": {"transformer.x.lora_A.weight": torch.ones(2, 3), "transformer.x.lora_B.weight": torch.ones(4, 2)},
        "model": {"conv_in.weight": torch.ones(2, 2)},
    }
    changes["wide"] = {
        k: v if "lora_A" in k else v[:, : v.shape[1] // 2].contiguous() for k, v in changes["wide"].items()
    }
    for name, tensors in changes.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "lora.bin").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / NAME).touch()
    (tmp_path / "both" / "model_index.json").touch()
    return tmp_path


WRONG = {
    "no input": (["--output", "out"], "INPUT"),
    "no output": (["lora", "other"], "`--output` is missing"),
    "missing path": (["lora", "nowhere", "--output", "out"], "`nowhere` does not exist"),
    "too few weights": (["lora", "other", "--weights", "1", "--output", "out"], "`--weights` gives 1 for 2 inputs"),
    "text as weight": (["lora", "other", "--weights", "1", "x", "--output", "out"], "`--weights` must be positive"),
    "weight of 0": (["lora", "other", "--weights", "0", "1", "--output", "out"], "'0' is not one"),
    "negative weight": (["lora", "other", "--weights", "-1", "1", "--output", "out"], "'-1' is not one"),
    "infinite weight": (["lora", "other", "--weights", "inf", "1", "--output", "out"], "'inf' is not one"),
    "huge weight": (
        ["lora", "other", "--weights", "1e308", "1e308", "--output", "out"],
        "`--weights 1e308` is out of",
    ),
    "tiny weight": (["lora", "other", "--weights", "1e-320", "1", "--output", "out"], "`--weights 1e-320` is out of"),
    "rank of 0": (["lora", "other", "--rank", "0", "--output", "out"], "`--rank` must be positive"),
    "half a rank": (["lora", "other", "--rank", "1.5", "--output", "out"], "`--rank` must be a whole number"),
    "rank of pipelines": (["pipeline", "second", "--rank", "2", "--output", "out"], "`--rank` is for LoRA files"),
    "unknown flag": (["lora", "--wieghts", "1", "--output", "out"], "Did you mean `--weights`?"),
    "two kinds": (["lora", "pipeline", "--output", "out"], "`pipeline` is a pipeline, but `lora` is a LoRA file"),
    "pipeline and unet": (["pipeline", "second/unet", "--output", "out"], "`second/unet` is a model folder"),
    "pickle": (["lora.bin", "--output", "out"], "`lora.bin` is not a .safetensors file"),
    "nothing in it": (["lora", "empty", "--output", "out"], "`empty` holds neither"),
    "both in it": (["both", "--output", "out"], f"give `both/{NAME}`"),
    "no LoRA": (["lora", "model.safetensors", "--output", "out"], "`model.safetensors` is not a LoRA file"),
    "other shapes": (["lora", "wide.safetensors", "--output", "out"], "`wide.safetensors` is for unet."),
    "other denoiser": (["lora", "flux.safetensors", "--output", "out"], "adapts the transformer, but `lora` the unet"),
    "output in use": (["lora", "other", "--output", "second"], "`--output second` is not empty"),
    "output a file": (["lora", "other", "--output", "lora.bin"], "`--output lora.bin` is not empty"),
    "output below a file": (["lora", "other", "--output", "lora.bin/x"], "`--output lora.bin/x` cannot be made in"),
    "output with a long name": (["lora", "other", "--output", "x" * 300], "cannot be used: File name too long"),
    "no LoRA for a new output": (["model.safetensors", "--output", "deep/out"], "is not a LoRA file"),
    "output in an input": (["pipeline", "second", "--output", "pipeline/unet/x"], "lies inside the input `pipeline`"),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_a_mistake_ends_in_one_line_and_code_2_and_leaves_nothing(world, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(world)
    before = sorted(world.rglob("*"))
    assert merge(*arguments) == 2
    line = the_line(capsys, "err")
    assert line.startswith("iet-finetune: error: ")
    assert said in line
    assert sorted(world.rglob("*")) == before


@pytest.mark.parametrize("output", ["deep/down/out", "link", "."])
def test_an_output_is_made_wherever_it_is_named(adapters, tmp_path, monkeypatch, output):
    paths, _ = adapters
    here = tmp_path / "a" / "here"  # beside a LoRA file that is merged: nothing else is read there
    (here / "empty").mkdir(parents=True)
    (here / "link").symlink_to("empty")
    monkeypatch.chdir(here if output != "." else here / "empty")
    assert merge(*paths, "--output", output) == 0
    found = here / ("empty" if output == "." else output)
    assert [path.name for path in found.iterdir()] == [NAME]
    assert not list(here.rglob(".*.partial"))


def test_the_commands_of_the_readme_work_as_they_stand_there(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^iet-finetune (merge .*)$", text, flags=re.MULTILINE)
    assert len(commands) == 2
    for seed, name in enumerate("abc"):
        save_adapter(tmp_path / f"lora_{name}", seed, LOW)
        save_tiny_sd(tmp_path / f"model_{name}", seed=seed)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert cli.main(shlex.split(command, comments=True)) == 0
    (merged_model,) = re.findall(r"`(DiffusionPipeline.from_pretrained\(.*?)`", text)
    (load,) = re.findall(r"`(pipeline.load_lora_weights.*?)`", text)
    pipeline = eval(merged_model, {"DiffusionPipeline": DiffusionPipeline})
    expected = merge_state_dicts([tiny_sd(seed=seed).unet.state_dict() for seed in range(2)])
    assert torch.equal(pipeline.unet.state_dict()["conv_in.weight"], expected["conv_in.weight"])
    eval(load, {"pipeline": pipeline})
    assert pipeline.get_active_adapters() == ["default_0"]


@pytest.mark.parametrize("argv", [["--help"], ["nowhere"], [".", "--weights", "x", "--output", "out"]])
def test_help_and_wrong_arguments_are_answered_without_torch(argv):
    code = f"""
import sys
from iet_finetune.cli import main
try:
    main(["merge", *{argv!r}])
except SystemExit:
    pass
print("torch" in sys.modules, "iet_finetune.cli.merge_command" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False True"


def test_the_program_s_help_lists_the_command(capsys):
    assert cli.main(["--help"]) == 0
    assert "\n  merge     merge LoRA files" in capsys.readouterr().out
