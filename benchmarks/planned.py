"""Does what `iet-finetune plan` says come true? Memory and time of small runs, planned and then measured.

Each is planned in a process of its own, from a few steps with two clones, and then run in another.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import save_images, save_pipeline
from running import MB, ROOT, as_flags, describe_machine, environment, finish, print_table, run

# How far a plan may be off.
MEMORY, TIME = 0.15, 0.30
IMAGE_SIZE = 32


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="which of them")
    parser.add_argument("--passes", type=int, default=4, help="of the demo's runs")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 512], help="of the six clones' UNet")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="on this disk outputs lie")
    return parser.parse_args(argv)


def demo(world: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Of the demo, all weights."""
    return {"config": ROOT / "configs/demo_iet_agc.yaml", "num_train_epochs": args.passes}


def demo_lora(world: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Of the demo, eight adapters, where a plan tries two."""
    return {"config": ROOT / "configs/demo_lora.yaml", "num_train_epochs": args.passes, "num_shards": 8}


def six_clones(world: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Six clones of a UNet of 53 M parameters with their optimizer state, where a plan tries two."""
    save_pipeline(world / "base", tuple(args.channels))
    save_images(world / "images", 48, IMAGE_SIZE)
    return {
        "pretrained_model_name_or_path": world / "base",
        "train_data_dir": world / "images",
        "resolution": IMAGE_SIZE,
        "num_shards": 6,
        "train_batch_size": 2,
        "num_train_epochs": 2,
        "merge_every_epochs": 1,
        "lr_warmup_steps": 0,
        "checkpoints_total_limit": 1,
    }


RUNS = {"demo": demo, "demo, LoRA": demo_lora, "six clones": six_clones}


def measure(settings: Mapping[str, Any], world: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the plan says, and what the run takes."""
    flags, reports = as_flags({**settings, "report_to": "none"}), [world / "plan.json", world / "run.json"]
    programs = [ROOT / "benchmarks/measured_plan.py", ROOT / "benchmarks/measured_run.py"]
    for program, report in zip(programs, reports, strict=True):
        output = world / report.stem
        run([sys.executable, str(program), str(report), *flags, "--output_dir", str(output)], environment(world))
    planned, measured = (json.loads(report.read_text(encoding="utf-8")) for report in reports)
    return planned, measured


def row_of(name: str, planned: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    return {
        "run": name,
        "planned MB": planned["resident"] // MB,
        "measured MB": measured["resident"] // MB,
        "memory": planned["resident"] / measured["resident"],
        "planned s": planned["seconds"],
        "measured s": measured["seconds"],
        "time": planned["seconds"] / measured["seconds"],
    }


def main(argv: list[str]) -> int:
    """Plan and run all of them."""
    args = parse(argv)
    rows, checks = [], []
    print(describe_machine(), flush=True)
    for name in args.runs:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            world = Path(folder)
            rows.append(row := row_of(name, *measure(RUNS[name](world, args), world)))
        checks += [
            (
                f"{name}: {what} is {row[what]:.2f} times the measured, wanted within {share:.0%}",
                off(row[what]) <= share,
            )
            for what, share in (("memory", MEMORY), ("time", TIME))
        ]
    print_table(rows)
    return finish(checks, args.json, {"machine": describe_machine(), "rows": rows})


def off(ratio: float) -> float:
    """By which share a planned number is off the measured one."""
    return abs(ratio - 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
