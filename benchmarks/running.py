"""What the benchmarks share: the environment of the processes they start, and how they print what they found."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
MB = 10**6


def environment(scratch: Path) -> dict[str, str]:
    """One thread a process, no network, caches in a scratch folder, and nothing of a launcher that runs us.

    Caches are where the environment says if it does.
    """
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    ours = {name: value for name, value in os.environ.items() if name not in launchers}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    caches = {"HF_HOME": str(scratch / "hf"), "HF_DATASETS_CACHE": str(scratch / "datasets")}
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**caches, **ours, **settings, "PYTHONPATH": os.pathsep.join(paths)}


def run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run a command quietly and return its stdout; where it fails, what it said is shown and this program ends."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nexit code {done.returncode} of: {' '.join(command)}")
    return done.stdout


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """The command line of a run's settings."""
    flags: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return flags


def describe_machine() -> str:
    """One line: what it ran on, and how busy that was with other things."""
    load = f", load {os.getloadavg()[0]:.1f} when it began" if hasattr(os, "getloadavg") else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    return f"{platform.system()} {platform.machine()}, {device}, one thread a process, torch {torch.__version__}{load}"


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same keys, as a table that Markdown reads too; numbers stand at the right."""
    heads, texts = list(rows[0]), [[_text(value) for value in row.values()] for row in rows]
    widths = [max(2, *(len(line[place]) for line in (heads, *texts))) for place in range(len(heads))]
    left = [isinstance(value, str) for value in rows[0].values()]
    rule = ["-" * width if at_left else "-" * (width - 1) + ":" for width, at_left in zip(widths, left, strict=True)]
    for line in (heads, rule, *texts):
        cells = [
            text.ljust(width) if at_left else text.rjust(width)
            for text, width, at_left in zip(line, widths, left, strict=True)
        ]
        print(f"| {' | '.join(cells)} |")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def finish(checks: Sequence[tuple[str, bool]], record: Path | None, content: Mapping[str, Any]) -> int:
    """Print what was asked for and whether it holds, and write everything to a JSON file if one is named.

    Returns:
        the exit code: 1 where something does not hold.
    """
    for text, holds in checks:
        print(f"{'pass' if holds else 'MISS'}: {text}")
    if record is not None:
        facts = {**content, "checks": [{"text": text, "holds": holds} for text, holds in checks]}
        record.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return int(not all(holds for _, holds in checks))
