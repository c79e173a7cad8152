"""How much memory does it take to encode 20,000 small images, and how long to open the cache afterwards?

Every image is encoded twice, as it is and mirrored, and every caption once; latents are as large as the images, so
that what is kept fills many files. A tenth of the images and all of them are encoded, each in a process of its own,
and the cache of all is opened in others. Reading and hashing the images is a column of its own: every start does it,
with or without a cache.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured_cache import SAMPLES
from pipelines import save_images, save_pipeline
from running import MB, ROOT, as_flags, describe_machine, environment, finish, print_table, run

from iet_finetune.cache.filling import FILE_BYTES

IMAGE_SIZE = 32
# Of own memory above the start, in sizes at which a file is written: writing one takes copies of its rows.
MOST_FILES = 4
MOST_SECONDS = 1.0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="how many; a tenth of them is encoded, too")
    parser.add_argument("--runs", type=int, default=3, help="processes that open the cache; medians are shown")
    parser.add_argument("--fast", action="store_true", help="a small version, 200 images, to see that it works")
    parser.add_argument("--dir", type=Path, help="where to put images and caches for the time being")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args(argv)
    if args.fast:
        args.images, args.runs = 200, 1
    return args


def files_of(cache: Path) -> dict[Path, int]:
    """Bytes by file."""
    return {path: path.stat().st_size for path in (cache / "iet_finetune" / "encoded").rglob("*.safetensors")}


def start(world: Path, count: int) -> dict[str, Any]:
    """What a fresh process reports that needs the rows of so many images: seconds, and bytes of memory."""
    settings = {
        "pretrained_model_name_or_path": world / "base",
        "train_data_dir": world / f"images-{count}",
        "cache_dir": world / f"cache-{count}",
        "resolution": IMAGE_SIZE,
        "random_flip": True,
        "train_batch_size": 8,
    }
    report = world / "report.json"
    run(
        [sys.executable, str(ROOT / "benchmarks/measured_cache.py"), str(report), *as_flags(settings)],
        environment(world),
    )
    return json.loads(report.read_text(encoding="utf-8"))


def row_of_filling(count: int, found: dict[str, Any], files: dict[Path, int]) -> dict[str, Any]:
    """A line of the first table."""
    return {
        "images": count,
        "files": len(files),
        "MB on disk": sum(files.values()) // MB,
        "images read, s": found["loaded"],
        "encoded, s": found["opened"],
        "images/s": count / found["opened"],
        "own MB before": found["before"] // MB,
        "at most more": (found["own"] - found["before"]) // MB,
        "peak resident MB": found["resident"] // MB,
    }


def row_of_opening(count: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of the second table: medians of the processes."""
    middle = {name: statistics.median(each[name] for each in found) for name in found[0]}
    return {
        "images": count,
        "images read, s": middle["loaded"],
        "opened, s": middle["opened"],
        f"{SAMPLES} samples, s": middle["read"],
        "own MB before": int(middle["before"]) // MB,
        "at most more": int(middle["own"] - middle["before"]) // MB,
        "peak resident MB": int(middle["resident"]) // MB,
        "with samples": int(middle["with_samples"]) // MB,
    }


def main(argv: list[str]) -> int:
    """Encode a tenth and all, open the cache of all, and print the tables."""
    args = parse(argv)
    machine = describe_machine()
    print(machine, flush=True)
    filled = []
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        world, cache = Path(folder), Path(folder, f"cache-{args.images}")
        save_pipeline(world / "base", channels=(8, 16), vae_channels=(8,))
        for count in (args.images // 10, args.images):
            save_images(world / f"images-{count}", count, IMAGE_SIZE)
            found = start(world, count)
            filled.append(row_of_filling(count, found, files_of(world / f"cache-{count}")))
        files = files_of(cache)
        opened = row_of_opening(args.images, [start(world, args.images) for _ in range(args.runs)])
        unchanged = files_of(cache) == files
    print_table(filled)
    print_table([opened])
    most, seconds = MOST_FILES * FILE_BYTES // MB, opened["opened, s"]
    checks = [
        (
            f"encoding {row['images']} images takes {row['at most more']} MB; wanted is at most {most}",
            row["at most more"] <= most,
        )
        for row in filled
    ]
    checks.append(("nothing is encoded again", unchanged))
    checks.append((f"it is opened in {seconds:.2f} s; wanted is less than {MOST_SECONDS:.0f}", seconds < MOST_SECONDS))
    return finish(checks, args.json, {"machine": machine, "filled": filled, "opened": opened})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
