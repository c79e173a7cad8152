"""Does memory grow with the number of clones? Peak resident memory of training with K clones, in a fresh process each.

The host's memory may grow only by the optimizer moments that `--optimizer_across_rounds keep` keeps for every clone,
and not by those if there is an `--offload_dir`. A GPU's memory may not grow at all.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipelines import save_images, save_pipeline
from running import MB, ROOT, as_flags, describe_machine, environment, finish, print_table, run

MODES = ("reset", "average", "keep", "keep, offloaded")
# Share of the whole by which a measured number may exceed what is expected.
TOLERANCE = 0.05
IMAGE_SIZE = 32
# Of one number in fp32, and of AdamW's two moments for it.
WEIGHT, MOMENTS = 4, 8


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clones", type=int, nargs="+", default=[2, 8, 32], help="K, the first to compare with")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="what becomes of the moments")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 512], help="of the UNet at each level")
    parser.add_argument("--images", type=int, default=32, help="how many, in all shards together")
    parser.add_argument("--rounds", type=int, default=2, help="each with one pass of every clone, and a merge")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="on this disk outputs lie for a while"
    )
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args(argv)


def check_room(folder: Path, parameters: int, clones: int) -> None:
    """End here rather than in the midst of it where the disk is too small.

    Two checkpoints, while the second replaces the first, hold the moments of all clones, and so do the offloaded ones.
    """
    need, free = parameters * (3 * clones * MOMENTS + 20 * WEIGHT), shutil.disk_usage(folder).free
    if need > free:
        sys.exit(f"{need / 1e9:.0f} GB are needed in {folder}, and {free / 1e9:.0f} are free: name a disk with --dir.")


def measure(world: Path, clones: int, mode: str, rounds: int) -> dict[str, Any]:
    """Peaks in bytes of one run with so many clones, whose output is removed."""
    moments, _, offloaded = mode.partition(", ")
    with tempfile.TemporaryDirectory(dir=world) as folder:
        settings = {
            "pretrained_model_name_or_path": world / "base",
            "train_data_dir": world / "images",
            "output_dir": Path(folder, "output"),
            "resolution": IMAGE_SIZE,
            "num_shards": clones,
            "optimizer_across_rounds": moments,
            "merge_every_epochs": 1,
            "num_train_epochs": rounds,
            "train_batch_size": 1,
            "lr_warmup_steps": 0,
            "checkpoints_total_limit": 1,
            "report_to": "none",
            **({"offload_dir": Path(folder, "offload")} if offloaded else {}),
        }
        report = Path(folder, "report.json")
        program = [sys.executable, str(ROOT / "benchmarks/measured_run.py"), str(report)]
        run([*program, *as_flags(settings)], environment(world))
        return json.loads(report.read_text(encoding="utf-8"))


def row_of(clones: int, mode: str, peaks: dict[str, Any], first: dict[str, Any], kept: int | None) -> dict[str, Any]:
    """A line of the table, in MB; `kept` are the bytes of moments expected beside those of the first K."""
    row = {
        "K": clones,
        "moments": mode,
        "peak resident MB": peaks["resident"] // MB,
        "own": peaks.get("RssAnon", 0) // MB,
        "of files": peaks.get("RssFile", 0) // MB,
        "shared": peaks.get("RssShmem", 0) // MB,
        "growth MB": (peaks["resident"] - first["resident"]) // MB,
        "growth": f"{peaks['resident'] / first['resident'] - 1:+.1%}",
        "kept moments MB": None if kept is None else kept // MB,
    }
    if peaks["device"] is not None:
        row["device MB"] = peaks["device"] // MB
    return row


def checks_of(
    clones: int, mode: str, peaks: dict[str, Any], first: dict[str, Any], kept: int
) -> list[tuple[str, bool]]:
    """What must hold of K clones against the first K."""
    growth = peaks["resident"] - first["resident"]
    if kept:
        wanted = f"{kept // MB} MB of moments, give or take {TOLERANCE:.0%} of all"
        holds = abs(growth - kept) <= TOLERANCE * peaks["resident"]
    else:
        wanted, holds = f"at most {TOLERANCE:.0%}", growth <= TOLERANCE * first["resident"]
    text = f"{mode}: host memory grows by {growth // MB} MB ({growth / first['resident']:.1%}) at K = {clones}"
    checks = [(f"{text}; wanted: {wanted}", holds)]
    if peaks["device"] is not None:
        grown = peaks["device"] / first["device"] - 1
        checks.append((f"{mode}: device memory grows by {grown:.1%} at K = {clones}", grown <= TOLERANCE))
    return checks


def main(argv: list[str]) -> int:
    """Measure all modes with all K."""
    args = parse(argv)
    rows, checks = [], []
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        world = Path(folder)
        parameters = save_pipeline(world / "base", tuple(args.channels))
        save_images(world / "images", args.images, IMAGE_SIZE)
        check_room(world, parameters, max(args.clones))
        print(f"UNet of {parameters / 1e6:.1f} M parameters, {args.images} images; {describe_machine()}", flush=True)
        for mode in args.modes:
            peaks = {}
            for clones in args.clones:
                peaks[clones] = measure(world, clones, mode, args.rounds)
                first, more = peaks[args.clones[0]], clones - args.clones[0]
                kept = MOMENTS * parameters * more if mode == "keep" else None
                rows.append(row_of(clones, mode, peaks[clones], first, kept))
                print(f"K = {clones}, {mode}: {rows[-1]['peak resident MB']} MB", flush=True)
            if more:
                checks += checks_of(clones, mode, peaks[clones], first, kept or 0)
    print_table(rows)
    return finish(checks, args.json, {"parameters": parameters, "machine": describe_machine(), "rows": rows})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
