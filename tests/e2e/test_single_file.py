"""The commands with a checkpoint file in the place of a pipeline's folder."""

import json
from pathlib import Path

import pytest
import torch
from audit_runs import read_audit, save_mosaic
from e2e.command import SMALL, words
from hub_server import HubServer, Repository
from original_layout import save_original
from publish.test_hub import TOKEN, run_python
from safetensors.torch import load_file
from tiny import save_images, tiny_sd

from iet_finetune import cli

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as a folder and as a file, another one as a file, and images."""
    folder = tmp_path_factory.mktemp("world")
    tiny_sd().save_pretrained(folder / "base")
    save_original(tiny_sd(), folder / "model.safetensors")
    tiny_sd(seed=1).save_pretrained(folder / "other")
    save_original(tiny_sd(seed=1), folder / "other.safetensors")
    save_images(folder / "data", 6)
    save_images(folder / "held", 6, seed=5)
    save_mosaic(folder)
    return folder


def test_a_file_is_audited_as_its_folder_with_a_file_as_reference(world, tmp_path):
    images = {"train_data_dir": world / "data", "holdout_data_dir": world / "held", "features": world / "mosaic.pt"}
    few = {"num_images": 3, "num_inference_steps": 2, "eval_batch_size": 4, "resolution": SMALL["resolution"]}
    found = []
    for name, model, reference in (("folder", "base", "other"), ("file", "model.safetensors", "other.safetensors")):
        given = {"model": world / model, "reference_model": world / reference, "output_dir": tmp_path / name}
        more = {"base_config": world / "base"} if name == "file" else {}
        assert cli.main(["audit", *words({**given, **images, **few, **more})]) == 0
        found.append(read_audit(tmp_path / name))
    assert found[1]["metrics"] == found[0]["metrics"]
    assert found[1]["fingerprint"] == found[0]["fingerprint"]
    assert found[1]["model"] == "model.safetensors"
    assert str(world) not in json.dumps(found[1])


def test_a_configuration_for_no_file_is_refused(world, tmp_path, capsys):
    given = {"model": world / "base", "base_config": world / "base", "output_dir": tmp_path / "out"}
    images = {"train_data_dir": world / "data", "holdout_data_dir": world / "held"}
    assert cli.main(["audit", *words({**given, **images})]) == 2
    assert "`--base_config" in capsys.readouterr().err


def test_files_are_merged_as_their_folders(world, tmp_path, capsys):
    given = ["--weights", "1", "3"]
    base = ["--base_config", str(world / "base")]
    inputs = {"folders": ("base", "other", []), "files": ("model.safetensors", "other", base)}
    for name, (first, second, more) in inputs.items():
        paths = [str(world / first), str(world / second)]
        assert cli.main(["merge", *paths, *given, *more, "--output", str(tmp_path / name)]) == 0
    ours, theirs = load_file(tmp_path / "files" / WEIGHTS), load_file(tmp_path / "folders" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    entries = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("files", "folders")]
    assert entries[0] == entries[1]
    capsys.readouterr()
    assert cli.main(["merge", str(world / "model.safetensors"), "--output", str(tmp_path / "x")]) == 2
    line = capsys.readouterr().err
    assert f"`{world / 'model.safetensors'}` looks like stable-diffusion-v1-5/" in line
    assert len(line.splitlines()) == 1
    assert cli.main(["merge", str(world / "base"), *base, "--output", str(tmp_path / "x")]) == 2
    assert "is for checkpoint files" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_pickle_ends_a_run_with_exit_code_2_and_one_line(world, tmp_path, capsys):
    torch.save({}, tmp_path / "model.ckpt")
    given = {"pretrained_model_name_or_path": tmp_path / "model.ckpt", "train_data_dir": world / "data"}
    assert cli.main(["train", *words({**given, **SMALL, "output_dir": tmp_path / "out"})]) == 2
    line = capsys.readouterr().err
    assert "model.ckpt` is a pickle" in line
    assert "Traceback" not in line


def test_a_recipe_with_a_file_is_tried_small(world, tmp_path):
    given = {"pretrained_model_name_or_path": world / "model.safetensors", "train_data_dir": world / "data"}
    assert cli.main(["train", *words({**given, **SMALL, "output_dir": tmp_path / "out", "smoke": True})]) == 0


def test_a_repository_with_fp16_files_alone_is_taken(tmp_path):
    tiny_sd().to(torch.float16).save_pretrained(tmp_path / "base", variant="fp16")
    files = {str(path.relative_to(tmp_path / "base")): path.read_bytes() for path in (tmp_path / "base").rglob("*.*")}
    code = """
import sys
from iet_finetune.config.settings import ModelConfig
from iet_finetune.families import find_pipeline, load_as_stored
model = ModelConfig(pretrained_model_name_or_path="user/half")
source = find_pipeline(model)
load_as_stored(source, model)
print(source.variant, source.notes, set(source.dtypes.values()))
"""
    with HubServer(TOKEN) as hub:
        hub.repositories["user/half"] = Repository(commits=[("all", files)])
        done = run_python(code, [], tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert "fp16" in done.stdout
    assert "torch.float16" in done.stdout
