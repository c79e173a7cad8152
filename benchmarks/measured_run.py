"""Trains as the flags say in this process and writes the memory that it took: measured_run.py REPORT FLAGS..."""

import json
import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from iet_finetune import Config, Trainer

STATUS = Path("/proc/self/status")
# Of the process's resident memory: its own, pages of mapped files, and shared, as pinned memory is.
PARTS = ("RssAnon", "RssFile", "RssShmem")
INTERVAL = 0.02


def read_status() -> dict[str, int]:
    """Bytes by name of what Linux tells of this process's memory; {} on another system."""
    if not STATUS.exists():
        return {}
    return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", STATUS.read_text(), re.M)}


def peak_resident() -> int:
    """The most bytes of memory that this process has had."""
    # Not the resource's number where there is another: it counts what the parent had when it started this process.
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return read_status().get("VmHWM", used)


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
    """Train, then write the peaks in bytes."""
    peaks: dict[str, int] = {}
    with sampled_peaks(peaks):
        Trainer(Config.from_command_line(flags)).train()
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    report.write_text(json.dumps({"resident": peak_resident(), "device": device, **peaks}), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
