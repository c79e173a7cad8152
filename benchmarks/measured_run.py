"""Trains as the flags say in this process; writes the memory and time that it took: measured_run.py REPORT FLAGS..."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from iet_finetune import Config, Trainer
from iet_finetune.planning.peaks import peak_resident, read_status

# Of the process's resident memory: its own, pages of mapped files, and shared, as pinned memory is.
PARTS = ("RssAnon", "RssFile", "RssShmem")
INTERVAL = 0.02


@contextmanager
def sampled_peaks(peaks: dict[str, int]) -> Iterator[None]:
    """Fills `peaks` with the highest of each part seen in the block, which a thread looks at every 20 ms."""
    ended = threading.Event()

    def look() -> None:
        while True:
            status = read_status()
            peaks.update({part: max(peaks.get(part, 0), status.get(part, 0)) for part in PARTS})
            if ended.wait(INTERVAL):
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def main(report: Path, flags: list[str]) -> None:
    """Train, then write the peaks in bytes, and the seconds."""
    peaks: dict[str, int] = {}
    began = time.perf_counter()
    with sampled_peaks(peaks):
        Trainer(Config.from_command_line(flags)).train()
    seconds = time.perf_counter() - began
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    report.write_text(
        json.dumps({"resident": peak_resident(), "device": device, "seconds": seconds, **peaks}), encoding="utf-8"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
