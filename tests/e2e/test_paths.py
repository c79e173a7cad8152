"""A run in folders of any name, given in any spelling, is the run that it is anywhere else."""

import json
import shutil
import unicodedata
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from e2e.command import SMALL, contents, leftovers, words
from tiny import save_images

from iet_finetune import Config, Trainer, cli

# One folder with all that a shell, an address, a pattern or a file system may take for something else.
NAME = f'it\'s 50%20 #1 [new] {{x,y}} a::b ?q "z" * $HOME \\ ä {unicodedata.normalize("NFD", "ö")}'
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def home(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a project of the name above, which is the working directory."""
    project = tmp_path / NAME
    for name in ("base", "data"):
        shutil.copytree(world / name, project / f"{name}: 1 [x]")
    save_images(project / "held#out?", 12, seed=5)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(project)
    return tmp_path


def run(command: str, **settings: object) -> int:
    """The command with these flags, as a first run in its process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return cli.main([command, *words(settings)])


def test_training_resuming_auditing_and_merging_take_any_name_in_any_spelling(home, world, capsys):
    here, there = home / NAME, f"~/{NAME}"
    sources = {"pretrained_model_name_or_path": "base: 1 [x]", "train_data_dir": "data: 1 [x]"}
    kept = {"cache_dir": "ca:che [x]", "offload_dir": "off:load?"}
    output = here / "exp:1e-4"
    first = {**SMALL, **sources, **kept, "output_dir": "exp:1e-4", "report_to": "tensorboard", "logging_dir": "lo:gs"}
    assert run("train", **first) == 0
    assert 'DiffusionPipeline.from_pretrained("exp:1e-4")' in capsys.readouterr().out
    assert (output / WEIGHTS).read_bytes() == (world / "trained" / WEIGHTS).read_bytes()
    with (output / "ledger.parquet").open("rb") as file:
        assert pyarrow.parquet.read_table(file)["image"].to_pylist()[0] == "data: 1 [x]/000.png"
    assert list(output.glob("lo:gs/*/events*"))
    assert list((here / "ca:che [x]").rglob("*.safetensors"))

    drawing = {"num_images": 2, "num_inference_steps": 2, "membership_images": 2, "num_train_epochs": 2}
    spelled = {name: f"{there}/{value}" for name, value in {**sources, **kept}.items()}
    (here / "re:cipe.yaml").write_text(yaml.safe_dump({**SMALL, **spelled, **drawing, "report_to": "none"}))
    resume = {"output_dir": f"{there}/exp:1e-4", "resume_from_checkpoint": f"{there}/exp:1e-4/checkpoint-6"}
    held_out = {"audit": True, "holdout_data_dir": f"{there}/held#out?"}
    assert run("train", config=f"{there}/re:cipe.yaml", **resume, **held_out) == 0
    audit = json.loads((output / "audit" / "audit.json").read_text(encoding="utf-8"))
    assert audit["metrics"]["heldout_loss"]["value"] > 0
    assert str(home) not in (output / "README.md").read_text(encoding="utf-8")

    assert cli.main(["merge", f"{there}/exp:1e-4", "base: 1 [x]", f"--output={there}/mer:ged"]) == 0
    for folder in (output, here / "mer:ged"):
        assert DiffusionPipeline.from_pretrained(folder).unet.config.sample_size > 0
    # Libraries keep caches of their own there, under names with a dot.
    assert [path.name for path in home.iterdir() if not path.name.startswith(".")] == [NAME]
    assert not list(home.rglob("~"))
    assert not leftovers(home)


def test_a_relative_folder_is_where_it_was_when_the_trainer_was_made(home, world, monkeypatch):
    project = home / NAME
    flags = {"pretrained_model_name_or_path": "base: 1 [x]", "train_data_dir": "data: 1 [x]", "output_dir": "out"}
    trainer = Trainer(Config.from_flags(**SMALL, **flags))
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    assert trainer.train() == project / "out"
    assert Path.cwd() == home / "elsewhere"
    assert not contents(home / "elsewhere")
    assert (project / "out" / WEIGHTS).read_bytes() == (world / "trained" / WEIGHTS).read_bytes()
