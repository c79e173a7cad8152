"""`--config` finds files and recipes by name, and a wheel brings the recipes with it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from iet_finetune import Config, UserError
from iet_finetune.cli.recipes_command import recipes_command
from iet_finetune.config.recipes import find_file, recipes

ROOT = Path(__file__).parents[2]


def test_a_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = Config.from_command_line(["--config", "sd15", "--seed", "3"])
    assert by_name == Config.from_command_line(["--config", str(ROOT / "configs" / "sd15.yaml"), "--seed", "3"])
    assert by_name.training.seed == 3


def test_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sd15").write_text("seed: 4\npretrained_model_name_or_path: sd\ntrain_data_dir: cats\n")
    assert Config.from_command_line(["--config", "sd15"]).training.seed == 4


def test_a_folder_of_that_name_hides_no_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    assert find_file("demo").name == "demo.yaml"


@pytest.mark.parametrize(
    ("name", "neighbour"), [("sd51", "sd15"), ("configs/demo_lor.yaml", "demo_lora"), ("xyzzy", None)]
)
def test_a_name_that_is_neither_names_the_nearest_recipe(name, neighbour, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        Config.from_command_line(["--config", name])
    assert str(caught.value) == (
        f"`--config {name}` cannot be read: there is no such file or recipe."
        f"{f' Did you mean `{neighbour}`?' if neighbour else ''} `iet-finetune recipes` lists the recipes."
    )


def test_recipes_are_listed_as_config_takes_them(tmp_path, monkeypatch):
    for folder, shown in ((ROOT, "configs/sd15.yaml "), (tmp_path, "sd15 ")):
        monkeypatch.chdir(folder)
        (line,) = (line for line in recipes_command([]).splitlines() if line.startswith(shown))
        assert find_file(line.split()[0]).samefile(ROOT / "configs" / "sd15.yaml")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The unpacked wheel of this package, built from a copy because building writes beside the sources."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("iet_finetune", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", built, source]
    subprocess.run(command, check=True, timeout=240)
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        archive.extractall(built / "site")
    return built / "site"


def test_a_wheel_brings_all_files_of_the_package_and_the_recipes(wheel):
    for folder, home in (("iet_finetune", "iet_finetune"), ("configs", "iet_finetune/configs")):
        files = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.*")}
        ours = {path for path in files if path.suffix in (".py", ".yaml", ".jinja", ".typed")}
        assert ours <= {path.relative_to(wheel / home) for path in (wheel / home).rglob("*.*")}


def test_a_copy_from_a_wheel_lists_its_recipes_and_finds_them_by_name(wheel, tmp_path):
    program = (
        "from iet_finetune import Config, __file__; from iet_finetune.cli import main; "
        "main(['recipes']); print(Config.from_command_line(['--config', 'sd15']).data.resolution, __file__)"
    )
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    *listed, last = result.stdout.splitlines()
    assert [line.split()[0] for line in listed] == [file.stem for file in recipes()], result.stderr
    assert last == f"512 {wheel / 'iet_finetune' / '__init__.py'}"
