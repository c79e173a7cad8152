"""How fast, and in how much memory, are the nearest training images found? Against the loop of the paper's code.

The loop compares one generated image after the other with all training images in fp32, and no mirrored ones; it is
written anew here and timed on some of the images. Ours is exact and compares both orientations, in a process of its
own.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from running import MB, describe_machine, environment, finish, print_table
from torch import Tensor

from iet_finetune.audit.measures.neighbours import Neighbours, nearest_pixels

LEAST_RATIO = 5.0
MOST_MEMORY = 2000
# Of the loop's, which mse_loss compares at a time.
BATCH = 1000


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generated", type=int, default=10_000, help="images that are looked for")
    parser.add_argument("--references", type=int, default=50_000, help="training images")
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--neighbours", type=int, default=50)
    parser.add_argument("--subset", type=int, default=40, help="images that the loop is timed on")
    parser.add_argument("--threads", type=int, default=2, help="of either")
    parser.add_argument(
        "--fast", action="store_true", help="a small version, 200 x 3,000 images, to see that it works"
    )
    parser.add_argument("--dir", type=Path, help="where to put the images for the time being")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--search", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.fast:
        args.generated, args.references, args.subset = 200, 3_000, 8
    return args


def smooth_images(count: int, side: int, seed: int) -> np.ndarray:
    """(count, side, side, 3) uint8: coarse noise, enlarged; in blocks, as fp32 takes four times the memory."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for start in range(0, count, 1000):
        coarse = torch.rand(min(1000, count - start), 3, 6, 6, generator=generator)
        fine = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
        blocks.append((fine * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy())
    return np.concatenate(blocks)


def write_images(folder: Path, args: argparse.Namespace) -> None:
    """Generated and training images; every tenth generated one is nearly a copy, every second of these mirrored."""
    rng = np.random.default_rng(0)
    counts = (args.references, args.generated)
    references, generated = (smooth_images(count, args.side, seed) for seed, count in enumerate(counts))
    for place in range(0, args.generated, 10):
        copy = references[rng.integers(args.references)][:, :: -1 if place % 20 else 1]
        generated[place] = np.clip(copy + rng.normal(0, 3, copy.shape), 0, 255)
    np.save(folder / "references.npy", references)
    np.save(folder / "generated.npy", generated)


def peak_memory() -> int:
    """The most bytes of memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def search(folder: Path, neighbours: int) -> None:
    """The process that is measured: finds the neighbours and writes them, its seconds and its memory."""
    generated, references = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("generated", "references"))
    began = time.perf_counter()
    found = nearest_pixels(generated, references, neighbours)
    report = {"seconds": time.perf_counter() - began, "peak": peak_memory()}
    np.savez(folder / "found.npz", **found._asdict())
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def errors_of(image: Tensor, references: Tensor) -> Tensor:
    """(N,) the mean squared error of an image to every reference, as the paper's code has it; all fp32 in [0, 1]."""
    batches = references.split(BATCH)
    return torch.cat([F.mse_loss(image.expand_as(b), b, reduction="none").mean(dim=(1, 2, 3)) for b in batches])


def time_loop(generated: Tensor, references: Tensor, k: int) -> float:
    """Seconds an image."""
    errors_of(generated[0], references)
    began = time.perf_counter()
    for image in generated:
        errors_of(image, references).topk(k, largest=False)
    return (time.perf_counter() - began) / len(generated)


def agree(found: Neighbours, generated: np.ndarray, references: np.ndarray, floats: Tensor) -> bool:
    """Whether ours are the loop's distances, in the nearer orientation, and exact for the references that they name.

    Args:
        found: the neighbours of `generated`.
        floats: the references in fp32.
    """
    k = found.index.shape[1]
    for row, image in enumerate(generated):
        both = (torch.from_numpy(side.copy()).float() / 255 for side in (image, image[:, ::-1]))
        errors = torch.minimum(*(errors_of(side, floats) for side in both)).topk(k, largest=False).values
        turned = np.where(found.flipped[row][:, None, None, None], image[:, ::-1], image).astype(np.int64)
        exact = ((turned - references[found.index[row]]) ** 2).sum(axis=(1, 2, 3)) / 255**2
        theirs = errors.double().numpy() * image.size
        if (exact != found.distance[row]).any() or not np.allclose(theirs, found.distance[row], rtol=1e-4):
            return False
    return True


def measure(folder: Path, args: argparse.Namespace) -> tuple[dict[str, float], float, bool]:
    """What the search reports, the loop's seconds an image, and whether they agree on the subset."""
    write_images(folder, args)
    command = [sys.executable, __file__, "--search", str(folder), "--neighbours", str(args.neighbours)]
    command += ["--threads", str(args.threads)]
    done = subprocess.run(
        command,
        env=environment(folder) | {"OMP_NUM_THREADS": str(args.threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    subset = np.linspace(0, args.generated - 1, args.subset).astype(int)
    generated, references = (np.load(folder / f"{name}.npy") for name in ("generated", "references"))
    generated, floats = generated[subset], torch.from_numpy(references).float().div_(255)
    seconds = time_loop(torch.from_numpy(generated).float() / 255, floats, args.neighbours)
    with np.load(folder / "found.npz") as file:
        found = Neighbours(*(file[name][subset] for name in Neighbours._fields))
    return report, seconds, agree(found, generated, references, floats)


def main(argv: list[str]) -> int:
    """Measure both and print the table."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.search:
        search(args.search, args.neighbours)
        return 0
    machine = describe_machine().replace("one thread a process", f"{args.threads} threads")
    print(machine, flush=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        report, loop_seconds, same = measure(Path(folder), args)
    ours = report["seconds"] / args.generated
    rows = [
        {
            "search": "ours, both orientations",
            "images": args.generated,
            "seconds": report["seconds"],
            "ms an image": 1000 * ours,
            "peak MB": report["peak"] // MB,
        },
        {
            "search": "the loop",
            "images": args.subset,
            "seconds": loop_seconds * args.subset,
            "ms an image": 1000 * loop_seconds,
            "peak MB": None,
        },
    ]
    print_table(rows)
    ratio, peak = loop_seconds / ours, report["peak"] / MB
    checks = [
        (f"{ratio:.1f} times as fast as the loop; wanted is {LEAST_RATIO:.0f}", ratio >= LEAST_RATIO),
        (f"the process takes {peak:.0f} MB; wanted is less than {MOST_MEMORY}", peak < MOST_MEMORY),
        (f"the same neighbours for {args.subset} images", same),
    ]
    sizes = {name: getattr(args, name) for name in ("references", "side", "neighbours", "threads")}
    return finish(checks, args.json, {"machine": machine, "sizes": sizes, "ratio": ratio, "rows": rows})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
