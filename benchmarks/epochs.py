"""Trains as the flags say, and prints the seconds of every epoch but the first: epochs.py STEPS FLAGS...

An epoch has so many steps, and ends before its merge: the time of an epoch includes the merge before it.
"""

import itertools
import json
import sys
import time

import torch
from stepped import SteppedTrainer

from iet_finetune import Config


def epoch_seconds(config: Config, steps: int) -> list[float]:
    """Seconds of each epoch of a run after the first one, in which everything is built."""
    marks: list[float] = []
    taken = itertools.count(1)

    def after_step() -> None:
        if next(taken) % steps == 0:
            marks.append(time.perf_counter())

    SteppedTrainer(config, after_step).train_rounds()
    return [end - begin for begin, end in itertools.pairwise(marks)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(epoch_seconds(Config.from_command_line(sys.argv[2:]), int(sys.argv[1]))))
