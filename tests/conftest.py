"""What holds for every test: no network, caches in a temporary folder, one thread, repeatable draws, small disks.

The environment is set before anything imports torch, datasets or huggingface_hub, which read it at import.
"""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# One folder a process, and so one for each worker of pytest-xdist.
_SCRATCH = Path(tempfile.mkdtemp(prefix="iet_finetune-tests-"))
atexit.register(shutil.rmtree, _SCRATCH, ignore_errors=True)

# Started in the background, a process ignores Ctrl-C, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(_SCRATCH / "hf")
os.environ["HF_DATASETS_CACHE"] = str(_SCRATCH / "datasets")
# Two threads on a busy machine are many times slower than one, and give other bits.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402 - conftest's imports follow the environment
import torch  # noqa: E402 - it reads the environment above
from hypothesis import settings  # noqa: E402 - as above

torch.set_num_threads(1)

# The first example of a test that imports a library takes as long as the import: no deadline.
settings.register_profile("explore", deadline=None)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable" if os.environ.get("CI") else "explore")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that at the end no worker of pytest-xdist waits for another's file."""
    tests = Counter(item.path for item in items)
    long = {item.path for item in items if item.path.parent.name == "e2e" or item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in long, -tests[item.path]))


def _forget_accelerator() -> None:
    """Accelerate keeps the precision and the ranks of a process's first run; what comes next is a first run."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerator_of_module() -> None:
    """For the module's own fixtures, which are made before any of a test's."""
    _forget_accelerator()


@pytest.fixture(autouse=True)
def fresh_accelerator(fresh_accelerator_of_module: None) -> None:
    """For every test."""
    _forget_accelerator()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser, in which pages are opened."""
    from browser import running_browser

    with running_browser() as running:
        yield running


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many bytes and returns its folder; skips the test where that is not allowed."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"cannot mount a small disk: {error}")
        if done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
