"""Does `iet-finetune data` find the copies in a folder, and how long does it look?

Copies of emoji (the demo's) and of garments (Debian's package dataset-fashion-mnist) are planted among them: exact
ones, and re-encoded, mirrored and slightly cropped ones. A copy is found if it is in one group with its original;
recall is the share of the planted copies that are found. Precision is the share of the images that are said to be
copies that are planted ones or their originals. Then 50,000 garments say how long it takes, in seconds of a processor.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from memorization.sources import emoji, garments
from PIL import Image
from running import describe_machine, finish, print_table

from iet_finetune.config.settings import DataConfig
from iet_finetune.data.survey import Survey, survey

KINDS = ("exact", "re-encoded", "mirrored", "cropped")
SIDE, QUALITY, CROP = 64, 75, 0.04
WANTED, MOST_SECONDS = 0.95, 300


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", type=int, default=200, help="how many copies")
    parser.add_argument("--originals", type=int, default=800, help="different images, half of them emoji")
    parser.add_argument("--count", type=int, default=50_000, help="images to be timed on; 0: none")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args(argv)


def copy_of(image: Image.Image, kind: str, rng: np.random.Generator) -> tuple[bytes, str]:
    """A copy of an image as a file, and the file's extension."""
    file = io.BytesIO()
    if kind == "mirrored":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if kind == "cropped":
        left, top, right, bottom = (rng.uniform(0, CROP, 4) * image.width).tolist()
        box = (left, top, image.width - right, image.height - bottom)
        image = image.resize(image.size, Image.Resampling.BICUBIC, box)
    if kind == "re-encoded":
        image.save(file, "JPEG", quality=QUALITY)
        return file.getvalue(), "jpg"
    image.save(file, "PNG")
    return file.getvalue(), "png"


def plant(folder: Path, originals: int, planted: int, seed: int = 0) -> dict[str, tuple[str, str]]:
    """Writes originals and copies; returns the original's name and the kind by the copy's name."""
    rng = np.random.default_rng(seed)
    sorts = (emoji().images, [image.convert("RGB") for image in garments(count=originals - originals // 2).images])
    images = [image for sort in sorts for image in sort[: originals // 2]]
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number:05d}.png")
    copies = {}
    for number, original in enumerate(rng.choice(len(images), planted, replace=False).tolist()):
        kind = KINDS[number % len(KINDS)]
        content, extension = copy_of(images[original], kind, rng)
        name = f"copy-{number:05d}.{extension}"
        (folder / name).write_bytes(content)
        copies[name] = (f"{original:05d}.png", kind)
    return copies


def judged(found: Survey, copies: dict[str, tuple[str, str]]) -> tuple[list[dict[str, Any]], float, float]:
    """A row by kind, recall and precision."""
    group_of = {found.name(index): number for number, group in enumerate(found.groups) for index in group}
    hits = {name: group_of.get(name, -1) == group_of.get(original, -2) for name, (original, _) in copies.items()}
    rows = []
    for kind in KINDS:
        mine = [name for name, (_, its) in copies.items() if its == kind]
        rows.append({"copies": kind, "planted": len(mine), "found": sum(hits[name] for name in mine)})
    innocent = set(copies) | {original for original, _ in copies.values()}
    said = list(group_of)
    return rows, sum(hits.values()) / len(hits), sum(name in innocent for name in said) / max(len(said), 1)


def timed(folder: Path, count: int) -> float:
    """Seconds of the processor until as many different garments are looked through, from a cold cache."""
    folder.mkdir()
    for number, image in enumerate(garments(count=count).images):
        image.save(folder / f"{number:05d}.png")
    began = time.process_time()
    looked(folder, folder.parent / "cache-many")
    return time.process_time() - began


def looked(folder: Path, cache: Path) -> Survey:
    """What `iet-finetune data` finds."""
    return survey(DataConfig(train_data_dir=str(folder), resolution=SIDE), seed=0, cache_dir=str(cache))


def main(argv: Sequence[str]) -> int:
    """Plant, look, judge; then the clock."""
    args = parse([*argv])
    machine = describe_machine()
    print(machine, flush=True)
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        copies = plant(home / "planted", args.originals, args.planted)
        rows, recall, precision = judged(looked(home / "planted", home / "cache"), copies)
        print_table(rows)
        checks = [
            (f"recall {recall:.1%}; wanted: at least {WANTED:.0%}", recall >= WANTED),
            (f"precision {precision:.1%}; wanted: at least {WANTED:.0%}", precision >= WANTED),
        ]
        facts: dict[str, Any] = {"machine": machine, "rows": rows, "recall": recall, "precision": precision}
        if args.count:
            facts["seconds"] = timed(home / "many", args.count)
            text = f"{args.count} images in {facts['seconds']:.0f} s of a processor; wanted: less than {MOST_SECONDS}"
            checks.append((text, facts["seconds"] < MOST_SECONDS))
    return finish(checks, args.json, facts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
