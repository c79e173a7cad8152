"""How long does a start take with 200,000 images, the first time and again, and in how much memory?

Small images in folders of 1,000, with one `metadata.jsonl` at the top, and the same as parquet files. They are made
once in `--home` and stay there. Each start is a process of its own that does what the trainer does with images until
the first step: list and read the rows, hash the images, hold some out, draw a subset, split it into shards, compute
the fingerprint, and read the first batch. The first start finds no cache; the second finds what the first one left.
Seconds are the processor's, so that a busy machine does not change them, but for those in the column `waited`.
"""

import argparse
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from running import MB, ROOT, as_flags, describe_machine, environment, finish, print_table, run

SIDE = 16
IN_A_FOLDER, IN_A_FILE = 1_000, 20_000
MOST_SECONDS, MOST_MB = 20, 1500
SOURCES = ("folder", "parquet")
# A file that has just been written is hashed again at the next start.
SETTLED_SECONDS = 3
HELD_OUT, LEFT_OUT = 0.05, 0.1


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000, help="how many images")
    parser.add_argument("--home", type=Path, required=True, help="where images are made, and found by the next run")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES, help="which of them to measure")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args(argv)


def pictures(count: int) -> Iterator[tuple[str, bytes, str]]:
    """Name, PNG file and caption of each image; every hundredth has the pixels of the one before."""
    rng = np.random.default_rng(0)
    for number in range(count):
        if number % 100 != 99:
            # Few colours, so that a file has a few hundred bytes.
            pixels = rng.integers(0, 4, (SIDE, SIDE, 3), dtype=np.uint8) * 80
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "PNG")
        yield f"{number // IN_A_FOLDER:04d}/{number:07d}.png", file.getvalue(), f"a made-up picture, number {number}"


def make_folder(home: Path, count: int) -> None:
    """Image files, and last the `metadata.jsonl` that names them."""
    with open(home / "metadata.partial", "w", encoding="utf-8") as rows:
        for name, data, text in pictures(count):
            path = home / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            rows.write(json.dumps({"file_name": name, "text": text}) + "\n")
    (home / "metadata.partial").rename(home / "metadata.jsonl")


def make_parquet(home: Path, count: int) -> None:
    """Parquet files as `datasets` writes them, with the images' bytes."""
    schema = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}).arrow_schema
    everything, files = pictures(count), -(-count // IN_A_FILE)
    for number in range(files):
        part = [next(everything) for _ in range(min(IN_A_FILE, count - number * IN_A_FILE))]
        images = [{"bytes": data, "path": name} for name, data, _ in part]
        table = pa.table({"image": images, "text": [text for *_, text in part]}, schema=schema)
        pq.write_table(table, home / f"train-{number:05d}-of-{files:05d}.parquet")


def made(home: Path, kind: str, count: int) -> Path:
    """The images of one kind in `home`; makes them if they are not there.

    Raises:
        SystemExit: the disk has no room for so many files.
    """
    folder, partial = home / f"{kind}-{count}", home / f"{kind}-{count}.partial"
    if folder.exists():
        return folder
    partial.mkdir(parents=True)
    if kind == "folder" and 0 < (free := os.statvfs(partial).f_favail) < 2 * count:
        sys.exit(f"`--home {home}`: {count} images need a file each, and the disk has room for {free}.")
    (make_folder if kind == "folder" else make_parquet)(partial, count)
    time.sleep(SETTLED_SECONDS)
    return partial.rename(folder)


def start(home: Path, kind: str, folder: Path, count: int) -> dict[str, Any]:
    """What a fresh process reports: seconds by stage, and the most bytes of memory."""
    settings = {
        "pretrained_model_name_or_path": "not-needed",
        "train_data_dir" if kind == "folder" else "dataset_name": folder,
        "cache_dir": home / f"cache-{kind}-{count}",
        "resolution": SIDE,
        "num_shards": 4,
        "holdout_fraction": HELD_OUT,
        "max_train_samples": count - int(LEFT_OUT * count),
        "cache_latents": False,
    }
    report = home / "report.json"
    command = [sys.executable, str(ROOT / "benchmarks/measured_start.py"), str(report), *as_flags(settings)]
    run(command, environment(home / "caches"))
    found = json.loads(report.read_text(encoding="utf-8"))
    report.unlink()
    return found


def row_of(kind: str, which: str, count: int, found: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    stages = {f"{name}, s": round(seconds, 2) for name, seconds in found["stages"].items()}
    return {
        "images": f"{count} {kind}",
        "start": which,
        **stages,
        "waited, s": round(found["waited"], 2),
        "peak MB": found["resident"] // MB,
    }


def main(argv: list[str]) -> int:
    """Make the images, start twice on each kind, and print the table."""
    args = parse(argv)
    machine = describe_machine()
    print(machine, flush=True)
    rows, checks = [], []
    for kind in args.sources:
        folder = made(args.home, kind, args.count)
        shutil.rmtree(args.home / f"cache-{kind}-{args.count}", ignore_errors=True)
        starts = {which: start(args.home, kind, folder, args.count) for which in ("first", "second")}
        rows += [row_of(kind, which, args.count, found) for which, found in starts.items()]
        again = rows[-1]
        checks += [
            ("the second start finds the same images", len({found["identity"] for found in starts.values()}) == 1),
            (
                f"{again['all, s']} s of the processor; wanted is less than {MOST_SECONDS}",
                again["all, s"] < MOST_SECONDS,
            ),
            (f"{again['peak MB']} MB; wanted is less than {MOST_MB}", again["peak MB"] < MOST_MB),
        ]
    print_table(rows)
    return finish(checks, args.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
