"""Do two ranks train twice as fast as one, and what does a merge cost? Images a second, and seconds a byte.

Ranks are launched by torchrun as a user launches them, with gloo on CPU cores or NCCL on two GPUs.
"""

import argparse
import json
import socket
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from running import MB, ROOT, as_flags, describe_machine, environment, finish, print_table, run
from timed_merge import time_merge

from iet_finetune.distributed.groups import Ranks

RANKS = (1, 2)
CLONES = 4
LEAST_SPEEDUP = 1.8
# Of a plain copy's time for as many bytes.
MOST_MERGE = 3.0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=128, help="of the demo's to train on")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--passes", type=int, default=3, help="of each clone between two merges")
    parser.add_argument("--rounds", type=int, default=3, help="the first is left out: it includes the start")
    parser.add_argument("--runs", type=int, default=3, help="of each number of ranks, taking turns")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 256, 512], help="of the UNet that is merged")
    parser.add_argument("--repeats", type=int, default=7, help="of the merge")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="on this disk outputs lie for a while"
    )
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args(argv)


def launch(scratch: Path, ranks: int, program: list[str]) -> None:
    """Run a program of this repository on so many ranks: one GPU each where there are enough, else CPU cores."""
    settings = environment(scratch)
    if torch.cuda.device_count() < max(RANKS):
        settings |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        if "lo" in [name for _, name in socket.if_nameindex()]:
            settings["GLOO_SOCKET_IFNAME"] = "lo"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    run([*torchrun, *program], settings)


def images_per_second(scratch: Path, ranks: int, args: argparse.Namespace) -> float:
    """Of one run's rounds after the first, checkpoints and merges included."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        settings = {
            "pretrained_model_name_or_path": ROOT / "demo/pipeline",
            "train_data_dir": ROOT / "demo/data/finetune",
            "output_dir": folder,
            "max_train_samples": args.images,
            "resolution": args.resolution,
            "num_shards": CLONES,
            "merge_every_epochs": args.passes,
            "num_train_epochs": args.passes * args.rounds,
            "train_batch_size": args.batch,
            "checkpoints_total_limit": 1,
            "report_to": "none",
            "seed": 1,
        }
        launch(scratch, ranks, [str(ROOT / "train_iet_agc.py"), *as_flags(settings)])
        lines = Path(folder, "timings.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines][1:]
    return args.images * args.passes * len(seconds) / sum(seconds)


def measure_speed(scratch: Path, args: argparse.Namespace) -> dict[int, list[float]]:
    """Images a second of each run, by number of ranks."""
    speeds: dict[int, list[float]] = {ranks: [] for ranks in RANKS}
    for _ in range(args.runs):
        for ranks, measured in speeds.items():
            measured.append(images_per_second(scratch, ranks, args))
            print(f"W = {ranks}: {measured[-1]:.1f} images/s", flush=True)
    return speeds


def measure_merge(scratch: Path, args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """What `time_merge` found, by number of ranks."""
    on_gpu = torch.cuda.device_count() >= max(RANKS)
    device = torch.device("cuda" if on_gpu else "cpu")
    found = {1: time_merge(Ranks.alone(), device, tuple(args.channels), CLONES, args.repeats)}
    report = scratch / "merge.json"
    numbers = [",".join(map(str, args.channels)), str(CLONES), str(args.repeats)]
    launch(scratch, RANKS[-1], [str(ROOT / "benchmarks/timed_merge.py"), str(report), *numbers])
    found[RANKS[-1]] = json.loads(report.read_text(encoding="utf-8"))
    return found


def merge_row(ranks: int, seconds: dict[str, float]) -> dict[str, Any]:
    """A line of the table: times by byte are those of all K clones' bytes against one copy's."""
    return {
        "ranks": ranks,
        "MB of a clone": int(seconds["bytes"]) // MB,
        "collect, s": seconds["collect"],
        "merge, s": seconds["merge"],
        "copy, s": seconds["copy"],
        "overwrite, s": seconds["overwrite"],
        "all / copy": seconds["all"] / CLONES / seconds["copy"],
        "all / overwrite": seconds["all"] / CLONES / seconds["overwrite"],
    }


def main(argv: list[str]) -> int:
    """Measure both and print the tables."""
    args = parse(argv)
    torch.set_num_threads(1)
    machine = describe_machine()
    print(machine, flush=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        merges = measure_merge(Path(folder), args)
        speeds = measure_speed(Path(folder), args)
    speedup = statistics.median(two / one for one, two in zip(*speeds.values(), strict=True))
    speed_rows = [{"ranks": ranks, "images/s": statistics.median(found)} for ranks, found in speeds.items()]
    merge_rows = [merge_row(ranks, seconds) for ranks, seconds in merges.items()]
    print_table(speed_rows)
    print_table(merge_rows)
    cost = merge_rows[0]["all / copy"]
    checks = [
        (f"two ranks are {speedup:.2f} times as fast as one; wanted are {LEAST_SPEEDUP}", speedup >= LEAST_SPEEDUP),
        (f"a merge takes {cost:.2f} times a copy's time a byte; wanted are {MOST_MERGE:.0f}", cost <= MOST_MERGE),
    ]
    content = {"machine": machine, "speedup": speedup, "speeds": speed_rows, "merges": merge_rows}
    return finish(checks, args.json, content)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
