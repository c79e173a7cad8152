"""What does the recipe for private photos cost? Seconds of a processor by what a run of the demo is at.

Looking (at losses, of images that may rest, and of held-out ones) is what the guard and the end by itself add to plain
training; the search for copies is done once for the same images.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from running import ROOT, describe_machine, finish, print_table

from iet_finetune import Callback, Config, Trainer
from iet_finetune.config.settings import GuardConfig
from iet_finetune.data.dataset import load_images
from iet_finetune.data.dedup import find_copies

# Of the time of the training itself.
MOST = 0.10


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=24, help="over the images")
    parser.add_argument("--lora", action="store_true", help="train an adapter")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args(argv)


class Clock(Callback):
    """Seconds of the processor in each phase of a run, encoding and others before the first step left out."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._phase, self._since, self._begun = "", 0.0, False

    def on_run_begin(self, facts: Any) -> None:
        """From here on it counts."""
        self._begun, self._since = True, time.process_time()

    def on_phase(self, phase: str) -> None:
        """Another phase begins."""
        if self._begun:
            self.seconds[self._phase] += time.process_time() - self._since
        self._phase, self._since = phase, time.process_time()


def main(argv: list[str]) -> int:
    """Search, train, and say what took how long."""
    args = parse(argv)
    machine = describe_machine()
    print(machine, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lora = ["--use_lora", "--rank", "4"] if args.lora else []
        flags = ["--config", str(ROOT / "configs" / "demo.yaml"), "--output_dir", str(Path(folder) / "out"), *lora]
        flags += ["--cache_dir", folder, "--report_to", "none", "--num_train_epochs", str(args.passes)]
        flags += ["--guard_budget", str(GuardConfig().guard_budget)]
        config = Config.from_command_line(flags)
        images, _ = load_images(config.data, cache_dir=folder, seed=0, needs_captions=True)
        began = time.process_time()
        find_copies(images, "near", config.data.resolution, folder)
        search = time.process_time() - began
        clock = Clock()
        Trainer(config, [clock]).train()
    rows = [{"at": phase or "preparing", "seconds": seconds} for phase, seconds in clock.seconds.most_common()]
    print_table(rows)
    share = clock.seconds["looking"] / clock.seconds["training"]
    print(f"the search for copies among {len(images)} images, once: {search:.1f} s")
    checks = [(f"looking takes {share:.1%} of the training's time; wanted: at most {MOST:.0%}", share <= MOST)]
    facts = {"machine": machine, "rows": rows, "search": search, "share": share, "lora": args.lora}
    return finish(checks, args.json, facts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
