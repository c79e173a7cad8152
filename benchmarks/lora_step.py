"""Does a step of LoRA training take longer than one of full fine-tuning? Those of `make demo` and `make demo-lora`.

The two take turns, step by step, in one process; what is compared is the time from batch to updated weights.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from running import MB, ROOT, describe_machine, finish, print_table

from iet_finetune.config.config import Config
from iet_finetune.distributed.groups import Ranks
from iet_finetune.training.assembly import Run, assemble
from iet_finetune.training.data import Data
from iet_finetune.training.model import Model
from iet_finetune.training.starting import start_accelerator

# Of full fine-tuning's time.
MOST_TIME = 1.0
WARM_UP = 5


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="of each, after the warm-up")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args(argv)


def assembled(folder: Path, recipe: str, batch: int) -> tuple[Data, Model, Run]:
    """Everything that trains a demo with its own settings, on one shard."""
    argv = ["--config", str(ROOT / f"configs/{recipe}.yaml"), "--output_dir", str(folder), "--report_to", "none"]
    paths = {"pretrained_model_name_or_path": ROOT / "demo/pipeline", "train_data_dir": ROOT / "demo/data/finetune"}
    settings = Config.from_command_line(argv).to_flags() | {name: str(path) for name, path in paths.items()}
    config = Config.from_flags(**settings | {"num_shards": 1, "train_batch_size": batch})
    return assemble(config, start_accelerator(config), Ranks.alone())


def steps_of(data: Data, run: Run, count: int) -> Iterator[object]:
    """Yields before the first and after every step of the only clone."""
    clone = run.ensemble.checkout([0])
    assert clone is not None
    yield None
    yield from run.local.run(clone, data.shards[0], data.schedule.steps(0, 0, count), run.learning_rates[0])


def main(argv: list[str]) -> int:
    """Measure both in turns and print the table."""
    args = parse(argv)
    torch.set_num_threads(1)
    machine = describe_machine()
    print(machine, flush=True)
    seconds: dict[str, list[float]] = {"full": [], "LoRA": []}
    with tempfile.TemporaryDirectory() as folder:
        recipes = {"full": "demo_iet_agc", "LoRA": "demo_lora"}
        runs = {name: assembled(Path(folder), recipe, args.batch) for name, recipe in recipes.items()}
        running = {name: steps_of(data, run, args.steps + WARM_UP) for name, (data, _, run) in runs.items()}
        for steps in running.values():
            next(steps)
        for _ in range(args.steps + WARM_UP):
            for name, steps in running.items():
                began = time.perf_counter()
                next(steps)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - began)
    measured = {name: statistics.median(found[WARM_UP:]) for name, found in seconds.items()}
    pairs = zip(seconds["LoRA"][WARM_UP:], seconds["full"][WARM_UP:], strict=True)
    ratio = statistics.median(lora / full for lora, full in pairs)
    rows = [
        {
            "trained": name,
            "ms a step": 1000 * measured[name],
            "MB trained": sum(tensor.nbytes for tensor in model.trainable.parameters.values()) / MB,
        }
        for name, (_, model, _) in runs.items()
    ]
    print_table(rows)
    checks = [
        (f"a LoRA step takes {ratio:.2f} times a full one's time; wanted is {MOST_TIME:.0f}", ratio <= MOST_TIME)
    ]
    return finish(checks, args.json, {"machine": machine, "ratio": ratio, "steps": rows})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
