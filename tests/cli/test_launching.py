"""The configurations for `accelerate launch` are what Accelerate reads, and the commands with them train."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from e2e.command import ROOT, environment, flags, words
from ranks import free_port
from safetensors.torch import load_file
from tiny import save_images, save_tiny_sd

FOLDER = ROOT / "configs" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
# File -> machines, processes that its name allows, engine, and whether it is for CPUs.
NAMES = {
    "cpu": (1, range(1, 2), DistributedType.NO, True),
    "one_gpu": (1, range(1, 2), DistributedType.NO, False),
    "several_gpus": (1, range(2, 17), DistributedType.MULTI_GPU, False),
    "two_machines": (2, range(2, 33, 2), DistributedType.MULTI_GPU, False),
}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def read(file: Path) -> ClusterConfig:
    """The file as Accelerate reads it, which refuses an unknown key."""
    return load_config_from_file(str(file))


def test_the_files_are_those_that_are_known_here():
    assert {file.stem for file in FILES} == set(NAMES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_says_what_its_name_says(file):
    machines, processes, engine, cpu = NAMES[file.stem]
    config = read(file)
    assert isinstance(config, ClusterConfig)
    assert config.num_machines == machines
    assert config.num_processes in processes
    assert config.distributed_type == engine
    assert config.use_cpu is cpu
    assert config.mixed_precision == "no", "unquoted, YAML takes it for False"
    assert config.machine_rank == 0
    assert (config.main_process_ip is not None) == (machines > 1)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_launch_takes_every_value_from_the_file(file):
    config = read(file)
    given = launch_command_parser().parse_args(["--config_file", str(file), "train_iet_agc.py"])
    taken, _, _ = _validate_launch_command(given)
    assert taken.multi_gpu == (config.distributed_type == DistributedType.MULTI_GPU)
    assert taken.gpu_ids == (config.gpu_ids or "all")
    for name in ("num_machines", "num_processes", "machine_rank", "main_process_ip", "main_process_port", "use_cpu"):
        assert getattr(taken, name) == getattr(config, name), name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_commands_in_a_file_are_for_that_file(file):
    lines = [line for line in file.read_text().splitlines() if line.startswith("# accelerate launch ")]
    assert len(lines) == NAMES[file.stem][0]
    for rank, line in enumerate(lines):
        typed = launch_command_parser().parse_args(shlex.split(line.removeprefix("# accelerate launch ")))
        assert ROOT / typed.config_file == file
        assert typed.machine_rank == (rank if len(lines) > 1 else None)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, a pipeline; `data`, 8 images."""
    folder = tmp_path_factory.mktemp("launching")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 8)
    return folder


def start(configuration: str, *launcher: str, settings: dict, **variables: str) -> "subprocess.Popen[str]":
    """`accelerate launch` with one of the configurations."""
    file = FOLDER / f"{configuration}.yaml"
    command = [*LAUNCH, "--config_file", str(file), *launcher, str(ROOT / "train_iet_agc.py"), *words(settings)]
    return processes.Popen(command, launcher=True, env=environment(**variables), stdout=-1, stderr=-1, text=True)


def finish(*launchers: "subprocess.Popen[str]") -> list[tuple[str, str]]:
    """Waits until all have ended well; returns what each said on stdout and stderr."""
    try:
        said = [launcher.communicate(timeout=120) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), said
    return said


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_configurations_for_a_cpu_and_for_two_machines_train_to_the_same_bits(small_world, tmp_path):
    settings = {"num_shards": 2, "learning_rate": 1e-3}
    alone, together = (flags(small_world, tmp_path / name, **settings) for name in ("alone", "together"))
    ((said, _),) = finish(start("cpu", settings=alone))
    assert f'DiffusionPipeline.from_pretrained("{tmp_path / "alone"}")' in said

    # Two machines played by this one, each with a process on its CPU where it would have GPUs.
    place = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    cpu = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    machines = [
        start("two_machines", *place, "--machine_rank", str(rank), settings=together, **cpu) for rank in range(2)
    ]
    (first, _), (second, _) = finish(*machines)
    assert f'DiffusionPipeline.from_pretrained("{tmp_path / "together"}")' in first
    assert second == "", "only rank 0 speaks"

    ours, theirs, before = weights(tmp_path / "together"), weights(tmp_path / "alone"), weights(small_world / "base")
    assert ours.keys() == theirs.keys() == before.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not all(torch.equal(ours[name], before[name]) for name in before)
