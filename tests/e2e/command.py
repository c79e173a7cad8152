"""The real command in tests: the flags of a small run, a process of its own, and what an error must look like."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny import RESOLUTION

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "train_iet_agc.py")]
ERROR = "iet-finetune: error: "

# 12 images in 3 shards, 2 to a step: a pass of a shard is two steps.
SMALL: dict[str, Any] = {
    "resolution": RESOLUTION,
    "train_batch_size": 2,
    "num_shards": 3,
    "num_train_epochs": 1,
    "merge_every_epochs": 1,
    "lr_warmup_steps": 0,
    "report_to": "none",
}


def flags(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """The flags of a small run on `world`, a folder with a pipeline `base` and images in `data`."""
    places = {"pretrained_model_name_or_path": world / "base", "train_data_dir": world / "data", "output_dir": output}
    return {**places, **SMALL, **changes}


def words(settings: dict[str, Any]) -> list[str]:
    """Flags as they are typed; one that is None is left out."""
    typed: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            typed.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            typed += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return typed


def environment(**settings: str) -> dict[str, str]:
    """The environment of a process that finds the package whether it is installed or not."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}


def run_script(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`train_iet_agc.py` in a process of its own, run to its end; `settings` join its environment."""
    return subprocess.run(
        [*SCRIPT, *arguments], env=environment(**settings), capture_output=True, text=True, timeout=120, check=False
    )


def the_error(code: int | None, stdout: str, stderr: str) -> str:
    """The one line of an error of the user, without the program's name; everything else about it is checked here."""
    assert "Traceback" not in stderr, stderr
    # transformers says on import that it goes without torchvision.
    lines = [line for line in stderr.splitlines() if not line.startswith("[transformers] ")]
    assert len(lines) == 1, stderr
    assert lines[0].startswith(ERROR), stderr
    assert code == 2
    assert stdout == ""
    return lines[0].removeprefix(ERROR)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    """What an interrupted write would leave behind."""
    names = (path.name for path in folder.rglob(".*"))
    return sorted(name for name in names if name.endswith((".partial", ".replaced", ".given-up")))
