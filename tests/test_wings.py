"""The wings of the house keep their order, no two files import each other, and what is light stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "iet_finetune"
# A wing may import those above it; `lora` and `audit` lie beside each other.
WINGS = (
    ("errors", "files", "environment"),
    ("config",),
    ("pages",),
    ("method",),
    ("distributed",),
    ("data",),
    ("families",),
    ("cache",),
    ("ensemble",),
    ("lora", "audit"),
    ("publish",),
    ("training",),
    ("planning",),
    ("doctor",),
    ("cli",),
)
# The same within `audit`.
FLOORS = ("inputs", "measures", "report")
# Only names the others: the package itself, lazily, and the entry of `python -m`.
DOORS = {Path("__init__.py"), Path("__main__.py")}
FILES = sorted({path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")} - DOORS)


def wing_of(module: str) -> str:
    """The wing of a module of the package: its folder, or its own name at the root."""
    return module.split(".")[1]


def allowed(wing: str) -> set[str]:
    """The wings that one may import, itself included."""
    (place,) = (place for place, side_by_side in enumerate(WINGS) if wing in side_by_side)
    above = {name for side_by_side in WINGS[:place] for name in side_by_side}
    # What everything may use may use itself.
    return {*above, wing, *(WINGS[0] if wing in WINGS[0] else ())}


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


def module_of(file: Path) -> str:
    """The full name of a file of the package."""
    parts = file.with_suffix("").parts
    return ".".join(["iet_finetune", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def faults(wing: str, names: set[str]) -> set[str]:
    """What of these full names a wing must not import; the version stands in the package itself."""
    own = {name for name in names if name.startswith("iet_finetune.")}
    return {name for name in own if wing_of(name) not in {*allowed(wing), "__version__"}}


def circle(imported: Mapping[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle; None if there are none.

    Args:
        imported: module -> the full names that it imports, of modules or of what is in them.
    """
    graph = {
        module: {found for name in names for found in (name, name.rpartition(".")[0]) if found in imported} - {module}
        for module, names in imported.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_the_root_is_small_and_every_folder_is_a_wing():
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    wings = {name for side_by_side in WINGS for name in side_by_side}
    assert {file.with_suffix("").parts[0] for file in FILES} == wings


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_wing_imports_only_wings_above_it(file):
    found = faults(wing_of(module_of(file)), imports_of(file))
    assert not found, f"{file} imports from beside or below: {sorted(found)}"


@pytest.mark.parametrize(
    ("wing", "name"),
    [
        ("method", "iet_finetune.errors.UserError"),
        ("ensemble", "iet_finetune.lora.adapters.Adapter"),
        ("lora", "iet_finetune.audit.run.run_audit"),
        ("audit", "iet_finetune.lora.merger"),
        ("training", "iet_finetune.cli.run"),
        ("errors", "iet_finetune.config.Config"),
    ],
)
def test_a_planted_import_from_beside_or_below_is_found(wing, name):
    if wing == "method":
        assert not paper(Path("agc.py"), {name, "torch"})
    else:
        assert faults(wing, {name, "torch", "iet_finetune.errors.UserError"}) == {name}


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] == "audit"], ids=str)
def test_what_an_audit_says_knows_what_it_measures_and_not_the_other_way_round(file):
    floors = [name.split(".")[2] for name in imports_of(file) if name.startswith("iet_finetune.audit.")]
    if file.parts[1] in FLOORS:
        assert set(floors) & set(FLOORS) <= set(FLOORS[: FLOORS.index(file.parts[1]) + 1])
        assert set(floors) <= set(FLOORS), "what is above the floors imports them"


def test_no_files_import_each_other_in_a_circle():
    assert circle({module_of(file): imports_of(file) for file in FILES}) is None


def test_a_planted_circle_is_found():
    planted = {"a": {"b.Name"}, "b": {"c"}, "c": {"torch", "a"}, "d": {"a"}}
    assert set(circle(planted) or ()) == {"a", "b", "c"}


# numpy's SeedSequence makes the random draws.
PAPER = {Path(f"{name}.py"): {"numpy"} for name in ("bucketing", "seeding", "sharding")}


def paper(file: Path, names: set[str]) -> bool:
    """Whether a file of `method` imports nothing but torch, its neighbours, and numpy where that is said above."""
    origins = {name.split(".")[0] for name in names if not name.startswith("iet_finetune.method.")}
    return origins - sys.stdlib_module_names <= {"torch", *PAPER.get(file, set())}


@pytest.mark.parametrize("file", sorted((PACKAGE / "method").glob("[!_]*.py")), ids=lambda file: file.name)
def test_the_paper_imports_nothing_but_torch_and_itself(file):
    assert paper(Path(file.name), imports_of(Path("method", file.name)))


@pytest.mark.parametrize("name", ["low_rank", "spectra"])
def test_the_matrices_of_adapters_are_torch_alone_too(name):
    names = {each for each in imports_of(Path("lora", f"{name}.py")) if not each.startswith("iet_finetune.lora.")}
    assert {each.split(".")[0] for each in names} - sys.stdlib_module_names == {"torch"}


def test_an_import_is_found_wherever_and_however_it_is_written():
    source = """
import iet_finetune.publish.hub
from ..ensemble import ema
from ..method.agc import AntiGradientControl
from .loader import Batch
if TYPE_CHECKING:
    from ..trainer import Trainer
else:
    import torch.nn
def late():
    from ..data.images import Image
"""
    assert set(imports(ast.parse(source), ["iet_finetune", "families"])) == {
        "iet_finetune.publish.hub",
        "iet_finetune.ensemble.ema",
        "iet_finetune.method.agc.AntiGradientControl",
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
    "code", ["import iet_finetune", "import iet_finetune.config.config", "from iet_finetune import Config"]
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
    modules = ("training.trainer", "publish.hub", "audit.report.compare")
    loaded_after(WITHOUT_THE_EXTRA + "\n".join(f"import iet_finetune.{module}" for module in modules))


def test_without_its_packages_an_audit_ends_in_a_line_that_says_how_to_get_them(monkeypatch, capsys):
    from iet_finetune import cli
    from iet_finetune.audit import flags

    monkeypatch.setattr(flags, "EXTRA", ("scipy_of_nobody", "torchmetrics_of_nobody"))
    assert cli.main(["audit", "--model", "somebody/model"]) == 2
    line = "an audit needs scipy_of_nobody and torchmetrics_of_nobody: `pip install 'iet_finetune[audit]'`."
    assert line in capsys.readouterr().err


PUBLIC = {
    "AntiGradientControl": "method.agc",
    "Callback": "training.callbacks",
    "ClassConditionalPipeline": "families.pipelines",
    "Config": "config.config",
    "NoiseSchedule": "method.objective",
    "Trainer": "training.trainer",
    "UserError": "errors",
    "WeightedSum": "method.merging",
    "merge_state_dicts": "method.merging",
    "per_sample_loss": "method.objective",
    "register_merge_rule": "config.registry",
    "register_sharding": "config.registry",
    "register_skip_rule": "config.registry",
    "shard_indices": "method.sharding",
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
