"""The real command in tests: the flags of a small run, a process of its own, and what an error must look like."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import psutil
import yaml
from ranks import free_port
from tiny import RESOLUTION

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "train_iet_agc.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PROGRAM = "iet-finetune: "
ERROR = f"{PROGRAM}error: "
# transformers says on import that it goes without torchvision, and we that something is encoded, and that AGC can do
# little in runs as short as those of tests.
HARMLESS = ("[transformers] ", "encoding ", "warning: AGC can hardly skip anything")
# Several ranks on one CPU: without the second, gloo looks for a network that a machine without one has not.
ON_CPU = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}

# 12 images in 3 shards, 2 to a step: a pass of a shard is two steps.
SMALL: dict[str, Any] = {
    "resolution": RESOLUTION,
    "train_batch_size": 2,
    "num_shards": 3,
    "num_train_epochs": 1,
    "merge_every_epochs": 1,
    "lr_warmup_steps": 0,
    "report_to": "none",
}
# 12 images in 4 shards, in steps of two micro-batches and of one. A round is 16 steps, with a checkpoint within it
# after all of them or every second one, and AGC skips.
IN_FOUR: dict[str, Any] = {
    "num_shards": 4,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 6,
    "merge_every_epochs": 2,
    "learning_rate": 1e-3,
    "agc_threshold": 0.99,
    "agc_decay": 0.1,
    "use_ema": True,
    "outer_lr": 0.7,
    "outer_momentum": 0.9,
    "random_flip": True,
    "logging_steps": 2,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 2,
    "resume_from_checkpoint": "latest",
}
STEPS_IN_FOUR = 48


def flags(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """The flags of a small run on `world`, a folder with a pipeline `base` and images in `data`."""
    places = {"pretrained_model_name_or_path": world / "base", "train_data_dir": world / "data", "output_dir": output}
    return {**places, **SMALL, **changes}


def words(settings: dict[str, Any]) -> list[str]:
    """Flags as they are typed; one that is None is left out."""
    typed: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            typed.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            typed += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return typed


def environment(**settings: str) -> dict[str, str]:
    """The environment of a process that finds the package whether it is installed or not."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}


def run_script(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`train_iet_agc.py` in a process of its own, run to its end; `settings` join its environment."""
    return processes.run([*SCRIPT, *arguments], env=environment(**settings))


def torchrun(ranks: int, settings: dict[str, Any]) -> list[str]:
    """The command line that starts so many ranks on this machine with these flags."""
    # Its own port is one for the whole machine, and another test may be running.
    launcher = [*TORCHRUN, "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    return [*launcher, SCRIPT[-1], *words(settings)]


@contextlib.contextmanager
def started(command: list[str], *, launcher: bool = False, **settings: str) -> Iterator["subprocess.Popen[str]"]:
    """The process of a command with its output in pipes; neither it nor one that it started outlives the block."""
    pipes = {"text": True, "stdout": -1, "stderr": -1}
    with processes.Popen(command, env=environment(**ON_CPU, **settings), launcher=launcher, **pipes) as process:
        try:
            yield process
        finally:
            for still in family(process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    still.kill()


@contextlib.contextmanager
def by_hand(*settings: dict[str, Any]) -> Iterator[list["subprocess.Popen[str]"]]:
    """A rank for each of `settings`, its flags: processes that no launcher looks after."""
    size = str(len(settings))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank, flags_ in enumerate(settings):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            ranks.append(stack.enter_context(started([*SCRIPT, *words(flags_)], **place, **meeting)))
        yield ranks


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """A process and all that it has started, as far as they still run."""
    try:
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def run_torchrun(ranks: int, settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """So many ranks under `torchrun`, run to their end."""
    with started(torchrun(ranks, settings), launcher=True) as process:
        stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_by_hand(ranks: int, settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """So many ranks that no launcher looks after, run to their end; the exit code is 0 if that of all is."""
    with by_hand(*[settings] * ranks) as processes_:
        said = [process.communicate(timeout=120) for process in processes_]
    codes = [process.returncode for process in processes_]
    stdout, stderr = ("".join(texts) for texts in zip(*said, strict=True))
    return subprocess.CompletedProcess(SCRIPT, next((code for code in codes if code), 0), stdout, stderr)


def wait_for(there: Callable[[], object], process: "subprocess.Popen[str]", limit: float = 120) -> None:
    """Waits until something is there, which `process` must bring about."""
    end = time.monotonic() + limit
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def the_line(code: int | None, stderr: str) -> str:
    """The one line that all ranks together say when they fail, whatever torch and its launcher say about that."""
    assert code not in (0, None), stderr
    for ours in ("train_iet_agc.py", "iet_finetune"):
        assert f'File "{ROOT / ours}' not in stderr, stderr
    said = [line[line.index(PROGRAM) :] for line in stderr.splitlines() if PROGRAM in line]
    assert len(said) == 1, stderr
    return said[0]


def the_error(code: int | None, stdout: str, stderr: str) -> str:
    """The one line of an error of the user, without the program's name; everything else about it is checked here."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if not line.startswith(HARMLESS)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith(ERROR), stderr
    assert code == 2
    # What a run has is said before the pipeline's weights are looked at.
    assert not stdout or stdout.startswith("images: "), stdout
    return lines[0].removeprefix(ERROR)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    """What an interrupted write would leave behind."""
    names = (path.name for path in folder.rglob(".*"))
    return sorted(name for name in names if name.endswith((".partial", ".replaced", ".given-up")))


def repeatable(output: Path) -> dict[str, bytes]:
    """The files of a run by path, without those that hold times; the output folder's own name is taken out."""
    files = {name: data for name, data in contents(output).items() if not name.startswith("logs/")}
    del files["timings.jsonl"]
    page = files["run.html"].decode().replace(str(output), "OUTPUT")
    files["run.html"] = re.sub(rf"(of |<h1>){re.escape(output.name)}(?=</)", r"\1OUTPUT", page).encode()
    # Read and written again: in a file, a long path with blanks is folded over two lines.
    config = yaml.safe_load(files["training_config.yaml"])
    assert config["output_dir"] == str(output)
    return files | {
        "training_config.yaml": yaml.safe_dump(config | {"output_dir": "OUTPUT"}, sort_keys=False).encode()
    }


def assert_same(ours: dict[str, bytes], theirs: dict[str, bytes]) -> None:
    assert sorted(ours) == sorted(theirs)
    assert [name for name in theirs if ours[name] != theirs[name]] == []
