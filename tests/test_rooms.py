"""The rooms of the house keep their order, and what is light stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "iet_finetune"
# A room may import the rooms above it. `tracking` stands above `ensemble` and `local`, which count with its meters.
ROOMS = (
    *(
        "errors",
        "files",
        "flags",
        "recipes",
        "settings",
        "config",
        "objective",
        "agc",
        "merging",
        "spectra",
        "low_rank",
        "seeding",
        "sharding",
        "schedule",
        "identity",
    ),
    *("compiling", "data", "pipelines", "families", "smoke"),
    *("adapters", "lora_file", "optimizers", "ema", "ledger", "placement"),
    *("watch", "meetings", "groups"),
    *("encoding", "cache_keys", "filling", "caching"),
    *("host", "budget", "checkpoint", "merger", "lora_clones", "lora_merger", "mergers", "lora_export", "outputs"),
    *("tracking",),
    *("clone", "ensemble", "validation", "local", "assembly", "result", "reporting"),
    *("audit", "audit_section", "card", "upload_list", "hub", "model_folder", "merge_command", "audit_command"),
    *("trainer", "cli"),
)
# Only names the others: the package itself, lazily, and the entry of `python -m`.
DOORS = {Path("__init__.py"), Path("__main__.py")}
FILES = sorted({path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")} - DOORS)


def room_of(file: Path) -> str:
    """The room that a file of the package belongs to: its folder, or its own name."""
    return file.with_suffix("").parts[0]


def imports(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """The full names of the modules and names that are imported anywhere in a file, for type checkers alone left out.

    `package` is the package that the file is in, as the parts of its name.
    """
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        children: Iterator[ast.AST] = iter(tree.orelse)
    else:
        children = ast.iter_child_nodes(tree)
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    if isinstance(tree, ast.ImportFrom):
        above = package[: len(package) - tree.level + 1] if tree.level else []
        yield from (".".join([*above, *filter(None, [tree.module]), alias.name]) for alias in tree.names)
    for child in children:
        yield from imports(child, package)


def imports_of(file: Path) -> set[str]:
    """The full names that a file of the package imports."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    return set(imports(tree, ["iet_finetune", *file.parts[:-1]]))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_is_in_a_room_of_the_list(file):
    assert room_of(file) in ROOMS


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_room_imports_only_rooms_above_it(file):
    own = room_of(file)
    inside = {name.split(".")[1] for name in imports_of(file) if name.startswith("iet_finetune.")}
    allowed = {*ROOMS[: ROOMS.index(own) + 1], "__version__"}
    assert inside <= allowed, f"{file} imports from below or from the package itself: {sorted(inside - allowed)}"


PAPER = ("objective", "agc", "merging", "spectra", "low_rank")


@pytest.mark.parametrize("room", PAPER)
def test_the_rooms_of_the_paper_import_nothing_but_torch_and_each_other(room):
    names = imports_of(Path(f"{room}.py"))
    origins = {name.split(".")[0] for name in names if not name.startswith(tuple(f"iet_finetune.{p}." for p in PAPER))}
    assert origins - sys.stdlib_module_names == {"torch"}


def test_an_import_is_found_wherever_and_however_it_is_written():
    source = """
import iet_finetune.hub
from .. import ema
from ..agc import AntiGradientControl
from .loader import Batch
if TYPE_CHECKING:
    from ..trainer import Trainer
else:
    import torch.nn
def late():
    from ..data.images import Image
"""
    assert set(imports(ast.parse(source), ["iet_finetune", "families"])) == {
        "iet_finetune.hub",
        "iet_finetune.ema",
        "iet_finetune.agc.AntiGradientControl",
        "iet_finetune.families.loader.Batch",
        "torch.nn",
        "iet_finetune.data.images.Image",
    }


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh Python has loaded after running `code`."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code", ["import iet_finetune", "import iet_finetune.config", "from iet_finetune import Config"]
)
def test_the_package_and_its_configuration_import_no_heavy_library(code):
    heavy = {"torch", "numpy", "diffusers", "transformers", "datasets", "accelerate", "peft", "huggingface_hub"}
    loaded = loaded_after(code)
    assert "iet_finetune" in loaded
    assert not loaded & heavy


WITHOUT_THE_EXTRA = """
import sys
sys.modules |= dict.fromkeys(("scipy", "torchmetrics", "efficientnet_lite_pytorch"))
"""


def test_without_the_packages_of_the_audit_everything_else_works():
    loaded_after(f"{WITHOUT_THE_EXTRA}\nimport iet_finetune.trainer, iet_finetune.hub, iet_finetune.audit.compare")


def test_without_its_packages_an_audit_ends_in_a_line_that_says_how_to_get_them(monkeypatch, capsys):
    from iet_finetune import audit_command, cli

    monkeypatch.setattr(audit_command, "EXTRA", ("scipy_of_nobody", "torchmetrics_of_nobody"))
    assert cli.main(["audit", "--model", "somebody/model"]) == 2
    line = "an audit needs scipy_of_nobody and torchmetrics_of_nobody: `pip install 'iet_finetune[audit]'`."
    assert line in capsys.readouterr().err


PUBLIC = {
    "AntiGradientControl": "agc",
    "ClassConditionalPipeline": "pipelines",
    "Config": "config",
    "NoiseSchedule": "objective",
    "Trainer": "trainer",
    "UserError": "errors",
    "WeightedSum": "merging",
    "merge_state_dicts": "merging",
    "per_sample_loss": "objective",
    "shard_indices": "sharding",
}


@pytest.mark.parametrize(("name", "room"), PUBLIC.items(), ids=PUBLIC)
def test_a_public_name_is_that_of_its_room(name, room):
    import importlib

    import iet_finetune

    assert getattr(iet_finetune, name) is getattr(importlib.import_module(f"iet_finetune.{room}"), name)
    assert name in dir(iet_finetune)


def test_type_checkers_see_the_same_public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == PUBLIC


def test_a_name_that_is_not_public_is_an_attribute_error():
    import iet_finetune

    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = iet_finetune.Trainr
