"""How much memory do several ranks of one machine take to hold a pipeline that is stored in half precision?

Each loads it in a process of its own and reads all of it: in fp32, as an audit does, or as stored, as a run does.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import save_pipeline
from running import MB, ROOT, describe_machine, environment, finish, print_table
from same_bits import halve

HOW = ("in fp32", "as stored")
# Share of the stored bytes that a rank may take of its own, beside the files, which all ranks share.
MOST_OWN = 0.1


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4], help="processes at a time")
    parser.add_argument("--channels", type=int, nargs="+", default=[128, 256, 768], help="of the UNet at each level")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="on this disk the pipeline lies")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args(argv)


def measure(base: Path, ranks: int, how: str, world: Path, settings: Mapping[str, str]) -> list[dict[str, int]]:
    """What each of so many processes found, in bytes; they measure while all hold the pipeline."""
    program = [sys.executable, str(ROOT / "benchmarks/measured_loading.py")]
    reports = [world / f"{rank}.json" for rank in range(ranks)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    started = [
        subprocess.Popen([*program, str(report), str(base), how], env=settings, text=True, **pipes)
        for report in reports
    ]
    for word in ("loaded", "measured"):
        for process in started:
            if process.stdout.readline().strip() != word:
                sys.exit(f"a process that loads the pipeline {how} has failed")
        for process in started:
            process.stdin.write("on\n")
            process.stdin.flush()
    for process in started:
        process.communicate()
    return [json.loads(report.read_text(encoding="utf-8")) for report in reports]


def row_of(ranks: int, how: str, found: list[dict[str, int]]) -> dict[str, Any]:
    """A line of the table, in MB."""
    own, peak = (max(each[name] for each in found) for name in ("own", "peak"))
    return {
        "ranks": ranks,
        "loaded": how,
        "own MB a rank": own // MB,
        "peak": peak // MB,
        "mapped, all ranks": sum(each["mapped"] for each in found) // MB,
        "together MB": sum(each["own"] + each["mapped"] for each in found) // MB,
    }


def main(argv: list[str]) -> int:
    """Measure both ways with all numbers of ranks."""
    args = parse(argv)
    rows, checks = [], []
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        world = Path(folder)
        save_pipeline(world / "base", tuple(args.channels))
        halve(world / "base")
        stored = sum(file.stat().st_size for file in (world / "base").rglob("*.safetensors"))
        print(f"a pipeline of {stored / MB:.0f} MB in half precision; {describe_machine()}", flush=True)
        for ranks in args.ranks:
            by_how = {how: measure(world / "base", ranks, how, world, environment(world)) for how in HOW}
            rows += [row_of(ranks, how, found) for how, found in by_how.items()]
            most = max(each["peak"] for each in by_how["as stored"])
            text = f"each of {ranks} ranks takes {most / stored:.1%} of the stored bytes of its own"
            checks.append((f"{text}; wanted: at most {MOST_OWN:.0%}", most <= MOST_OWN * stored))
    print_table(rows)
    return finish(checks, args.json, {"stored": stored, "machine": describe_machine(), "rows": rows})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
