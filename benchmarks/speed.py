"""Is training faster than a plain loop, and what do anti-gradient control, clones and the start cost?

The plain loop is written anew and does in each step what diffusers' train_text_to_image.py does. Everything that is
compared takes turns in one process, a few steps at a time, on the same pipeline and images; only the start-up is
timed in fresh processes.
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import ArrayLike
from pipelines import operations, save_photos, save_small_sd, save_tiny_sd
from plain_loop import Pictures, plain_loop
from running import ROOT, as_flags, describe_machine, environment, finish, print_table, run
from start_up import FIRST_STEP, LOADED_PIPELINE, time_lines
from stepped import Over, Program, SteppedTrainer, Turns, allocate_as_in_a_run, parts_timed

from iet_finetune import Config

PIPELINE, IMAGES = ROOT / "demo/pipeline", ROOT / "demo/data/finetune"
RESOLUTION, BATCH = 64, 8
# Ratios of images a second, and of the seconds until something is done.
LEAST_SPEED, LEAST_CACHED, LEAST_WITH_CONTROL = 1.0, 1.5, 0.99
MOST_START = 1.3
# Operators that make the host wait for the device.
WAITS = ("aten::_local_scalar_dense", "aten::nonzero")
# Timed in each run of those that are compared whole, after one that is not.
EPOCHS_OF_A_RUN = 2
# In the run that is profiled: the steps between two that log are.
LOGGING_STEPS = 4


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="of the demo's to train on")
    parser.add_argument("--photos", type=int, default=128, help="to compare the cache with the plain loop on")
    parser.add_argument("--clones", type=int, default=16, help="K of the run that is compared with K = 1")
    parser.add_argument("--runs", type=int, default=3, help="with one clone and with K, in turns")
    parser.add_argument("--epochs", type=int, default=5, help="that are timed, after one that is not")
    parser.add_argument("--starts", type=int, default=5, help="of each kind, after one that is not timed")
    parser.add_argument("--fast", action="store_true", help="a small version, to see that it works")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="on this disk outputs lie for a while"
    )
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args(argv)
    if args.fast:
        args.images, args.photos, args.clones, args.runs, args.epochs, args.starts = 16, 8, 2, 1, 1, 1
    if args.images % (each := args.clones * BATCH):
        parser.error(f"--images {args.images}: must be a multiple of {each}, for full batches of every clone.")
    return args


def flags_of(folder: Path, images: int, **settings: Any) -> dict[str, Any]:
    """A run's flags: those of the plain loop, a merge after every epoch, and a cache beside the output."""
    return {
        "cache_dir": folder.parent / "cache",
        "pretrained_model_name_or_path": PIPELINE,
        "train_data_dir": IMAGES,
        "max_train_samples": images,
        "output_dir": folder,
        "resolution": RESOLUTION,
        "train_batch_size": BATCH,
        "merge_every_epochs": 1,
        "num_train_epochs": 1000,
        "mixed_precision": "no",
        "report_to": "none",
    } | settings


def config_of(scratch: Path, images: int, **settings: Any) -> Config:
    """The configuration of such a run, in a new folder, with half of the images mirrored."""
    flags = flags_of(Path(tempfile.mkdtemp(dir=scratch)), images, **settings)
    return Config.from_command_line([*as_flags(flags), "--random_flip"])


def our_program(config: Config) -> Program:
    """The trainer, built when it first goes on."""
    return lambda after_step: SteppedTrainer(config, after_step).train_rounds()


# --- speed -----------------------------------------------------------------------------------------------------------


def take_turns(
    programs: Mapping[str, Program], turns_of_epoch: int, steps: int, epochs: int
) -> dict[str, list[float]]:
    """Seconds of every turn, by program; the first epoch, in which everything is built, is left out.

    Args:
        turns_of_epoch: in an epoch.
        steps: in a turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    with contextlib.ExitStack() as stack:
        turns = {name: stack.enter_context(contextlib.closing(Turns(each))) for name, each in programs.items()}
        for number in range((1 + epochs) * turns_of_epoch):
            # To and fro: neighbours are compared, and neither is to come first each time.
            for name in reversed(turns) if number % 2 else turns:
                began = time.perf_counter()
                turns[name].advance(steps)
                seconds[name].append(time.perf_counter() - began)
    return {name: found[turns_of_epoch:] for name, found in seconds.items()}


class Ratio(NamedTuple):
    """The middle of the ratios of pairs, and between which two values half of them lie."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: ArrayLike, below: ArrayLike) -> "Ratio":
        """Of pairs that were measured one right after the other."""
        low, median, high = np.quantile(np.divide(above, below), (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high)

    def check(self, text: str, least: float) -> tuple[str, bool]:
        """What was wanted, with `text` before the figure."""
        found = f"{text} {self.median:.3f} (half of the pairs from {self.low:.3f} to {self.high:.3f})"
        return f"{found}; wanted is at least {least}", self.median >= least


def measure_speed(scratch: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Ratio]]:
    """The table of images a second of the demo's pipeline, and the speeds of pairs."""
    ours = {
        "K = 1, uncached": config_of(scratch, args.images, agc_threshold=0, cache_latents=False),
        "K = 1": config_of(scratch, args.images, agc_threshold=0),
        "K = 1, AGC": config_of(scratch, args.images),
    }
    pictures, steps = Pictures(IMAGES, args.images, RESOLUTION), args.images // args.clones // BATCH
    programs: dict[str, Program] = {"plain loop": partial(plain_loop, PIPELINE, pictures, BATCH)}
    programs |= {name: our_program(config) for name, config in ours.items()}
    seconds = take_turns(programs, args.clones, steps, args.epochs)
    rows = [
        {
            "training": name,
            "images/s": args.images * args.epochs / sum(found),
            "ms a step": 1000 * statistics.median(found) / steps,
        }
        for name, found in seconds.items()
    ]
    plain, uncached, off, on = seconds.values()
    return rows, {"plain": Ratio.of(plain, uncached), "control": Ratio.of(off, on)}


def measure_clones(scratch: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], Ratio]:
    """The table of whole runs with one clone and with many, which take turns, and the speeds of pairs of epochs.

    Each has a process of its own, as a run has. In one process what came before decides how the C library reuses
    memory, and with it by several per cent how fast runs of one and of many clones are.
    """
    found: dict[int, list[float]] = {1: [], args.clones: []}
    for number in range(args.runs):
        for clones in reversed(found) if number % 2 else found:
            settings = {"num_shards": clones, "num_train_epochs": 1 + EPOCHS_OF_A_RUN}
            flags = flags_of(Path(tempfile.mkdtemp(dir=scratch)), args.images, **settings)
            command = [sys.executable, str(ROOT / "benchmarks/epochs.py"), str(args.images // BATCH)]
            said = run([*command, *as_flags(flags), "--random_flip"], environment(scratch))
            found[clones] += json.loads(said.splitlines()[-1])
    rows = [
        {"training": f"K = {clones}, AGC", "ms a step": 1000 * statistics.median(seconds) * BATCH / args.images}
        for clones, seconds in found.items()
    ]
    return rows, Ratio.of(*found.values())


class Task(NamedTuple):
    """What is trained on what; `encoding` is the arithmetic of encoding by that of the UNet's two passes."""

    name: str
    base: Path
    images: Path
    encoding: float


def tasks(scratch: Path, args: argparse.Namespace) -> list[Task]:
    """A tiny Stable Diffusion, the demo, and Stable Diffusion in small from images of its size and from photos."""
    tiny, small = save_tiny_sd(scratch / "tiny"), save_small_sd(scratch / "small")
    photos, with_size = save_photos(scratch / "photos", IMAGES, args.photos), "from photos of 500 x 375"
    return [
        Task("tiny Stable Diffusion", tiny, IMAGES, encoding_share(tiny)),
        Task("the demo", PIPELINE, IMAGES, encoding_share(PIPELINE)),
        Task("small Stable Diffusion", small, IMAGES, encoding_share(small)),
        Task(f"small Stable Diffusion, {with_size}", small, photos, encoding_share(small)),
    ]


def encoding_share(base: Path) -> float:
    """Operations of encoding an image over those of the UNet's forward and backward pass."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    encode, denoise = operations(pipeline.vae, pipeline.unet, RESOLUTION)
    return encode / denoise


def measure_cache(scratch: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], Ratio]:
    """The table of ours, cached, against the plain loop on several tasks, and the ratio of the first."""
    rows, ratios = [], []
    for task in tasks(scratch, args):
        flags = {"pretrained_model_name_or_path": task.base, "train_data_dir": task.images, "agc_threshold": 0}
        programs: dict[str, Program] = {
            "plain loop": partial(plain_loop, task.base, Pictures(task.images, args.photos, RESOLUTION), BATCH),
            "ours": our_program(config_of(scratch, args.photos, **flags)),
        }
        steps = min(4, args.photos // BATCH)
        plain, ours = take_turns(programs, args.photos // BATCH // steps, steps, args.epochs).values()
        ratios.append(ratio := Ratio.of(plain, ours))
        rows.append(
            {
                "training": task.name,
                "encoding / UNet": task.encoding,
                "plain loop, ms a step": 1000 * statistics.median(plain) / steps,
                "ours, ms a step": 1000 * statistics.median(ours) / steps,
                "speed": ratio.median,
                "half of the pairs": f"{ratio.low:.3f} to {ratio.high:.3f}",
            }
        )
    return rows, ratios[0]


# --- breakdown -------------------------------------------------------------------------------------------------------


def break_down(scratch: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of a step's parts, in a run with clones and a merge after every epoch, with the cache and without."""
    without, cached = (spent_by_part(scratch, args, cache_latents=cache) for cache in (False, True))
    epoch = args.images // BATCH
    return [
        {
            "part": part,
            "ms a step": 1000 * cached.get(part, 0.0) / epoch,
            "ms a round": 1000 * cached.get(part, 0.0),
            "share": f"{cached.get(part, 0.0) / cached['all']:.1%}",
            "without the cache, ms a step": 1000 * seconds / epoch,
        }
        for part, seconds in without.items()
    ]


def spent_by_part(scratch: Path, args: argparse.Namespace, **settings: Any) -> dict[str, float]:
    """Seconds of each part in an epoch, after one in which everything is built."""
    spent: dict[str, float] = defaultdict(float)
    config = config_of(scratch, args.images, num_shards=args.clones, **settings)

    def program(pause: Callable[[], None]) -> None:
        trainer = SteppedTrainer(config, pause)
        with parts_timed(trainer, spent):
            trainer.train_rounds()

    epoch, epochs = args.images // BATCH, min(2, args.epochs)
    with contextlib.closing(Turns(program)) as turns:
        turns.advance(epoch)
        spent.update(dict.fromkeys(spent, 0.0))
        began = time.perf_counter()
        turns.advance(epochs * epoch)
        total = time.perf_counter() - began
    spent["everything else"] = total - sum(spent.values())
    spent["all"] = total
    return {part: seconds / epochs for part, seconds in spent.items()}


class Waits(NamedTuple):
    """How often the host waits for the device in a step, or would if there were one.

    torch's fused optimizers read a step count for each parameter on a CPU; on a GPU their kernels do that.
    """

    optimizer: float
    elsewhere: float


def count_waits(scratch: Path, args: argparse.Namespace) -> Waits:
    """Of the steps between two that log, as torch's profiler counts them."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    taken = itertools.count(1)

    def after_step() -> None:
        number = next(taken)
        if number == LOGGING_STEPS:
            profiler.start()
        elif number == 2 * LOGGING_STEPS - 1:
            profiler.stop()
            raise Over

    trainer = SteppedTrainer(
        config_of(scratch, args.images, merge_every_epochs=100, logging_steps=LOGGING_STEPS), after_step
    )
    with contextlib.suppress(Over):
        trainer.train_rounds()
    waits = [event for event in profiler.events() if event.name in WAITS]
    inside = sum("aten::_fused_adamw_" in callers(event) for event in waits)
    return Waits(inside / (LOGGING_STEPS - 1), (len(waits) - inside) / (LOGGING_STEPS - 1))


def callers(event: Any) -> list[str]:
    """The names of the operators that an operator was called by, from the inside out."""
    names: list[str] = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names


# --- start-up --------------------------------------------------------------------------------------------------------


def measure_start(scratch: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], Ratio]:
    """The table of both starts, medians, and the ratios of pairs."""
    ours: list[list[float]] = []
    plain: list[list[float]] = []
    # The first ones fill the caches.
    unmeasured = 0 if args.fast else 1
    for _ in range(unmeasured + args.starts):
        flags = as_flags(flags_of(Path(tempfile.mkdtemp(dir=scratch)), args.images))
        ours.append(time_lines(FIRST_STEP, [*flags, "--random_flip"], scratch))
        plain.append(time_lines(LOADED_PIPELINE, [str(PIPELINE)], scratch))
    ours, plain = ours[unmeasured:], plain[unmeasured:]
    rows = []
    for name, found in (("diffusers, pipeline loaded", plain), ("ours, first step done", ours)):
        imported, *others = (statistics.median(times) for times in zip(*found, strict=True))
        built = others[0] if len(others) > 1 else None
        rows.append({"start": name, "imported, s": imported, "built, s": built, "done, s": others[-1]})
    return rows, Ratio.of([times[-1] for times in ours], [times[-1] for times in plain])


def main(argv: list[str]) -> int:
    """Measure everything and print the tables."""
    args = parse(argv)
    torch.set_num_threads(1)
    allocate_as_in_a_run()
    machine = describe_machine()
    print(machine, flush=True)
    # What the trainers tell of their rounds.
    with tempfile.TemporaryDirectory(dir=args.dir) as folder, contextlib.redirect_stderr(io.StringIO()):
        scratch = Path(folder)
        starts, start = measure_start(scratch, args)
        print_table(starts)
        speeds, ratios = measure_speed(scratch, args)
        print_table(speeds)
        cloned, ratios["clones"] = measure_clones(scratch, args)
        print_table(cloned)
        print(f"speed of K = {args.clones} over that of K = 1: {ratios['clones'].median:.3f}", flush=True)
        cached, ratios["cached"] = measure_cache(scratch, args)
        print_table(cached)
        parts = break_down(scratch, args)
        print_table(parts)
        waits = count_waits(scratch, args)
    checks = [
        ratios["plain"].check("speed of ours without the cache over the plain loop's:", LEAST_SPEED),
        ratios["cached"].check(f"speed with the cache over the plain loop's, {cached[0]['training']}:", LEAST_CACHED),
        ratios["control"].check("speed with anti-gradient control over that without:", LEAST_WITH_CONTROL),
        (
            f"seconds to the end of the first step over diffusers' to load the pipeline: {start.median:.3f} "
            f"(half of the pairs from {start.low:.3f} to {start.high:.3f}); wanted is at most {MOST_START}",
            start.median <= MOST_START,
        ),
        (
            f"between two log lines the host waits for the device {waits.elsewhere:.2g} times a step, beside "
            f"{waits.optimizer:.0f} in torch's fused optimizer for CPUs; wanted is 0",
            waits.elsewhere == 0,
        ),
    ]
    content = {"machine": machine, "images": args.images, "speeds": speeds, "cached": cached, "parts": parts}
    content |= {"clones": cloned, "starts": starts}
    spread = {name: ratio._asdict() for name, ratio in {**ratios, "start": start}.items()}
    return finish(checks, args.json, {**content, "ratios": spread, "waits": waits._asdict()})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
