"""`iet-finetune doctor` says what it finds on a machine, and what is missing for what."""

from pathlib import Path

import pytest
import torch

from iet_finetune import cli
from iet_finetune.doctor import machine
from iet_finetune.doctor.machine import about_machine


@pytest.fixture
def launch_file(tmp_path, monkeypatch) -> Path:
    """The configuration of `accelerate launch`, which is not there yet."""
    from accelerate.commands.config import config_args

    file = tmp_path / "default_config.yaml"
    monkeypatch.setattr(config_args, "default_config_file", str(file))
    return file


def told(name: str) -> str:
    """The line that begins so."""
    (line,) = [line for line in about_machine() if line.startswith(f"{name}: ")]
    return line


def test_the_command_says_it_all_in_lines(capsys, launch_file):
    assert cli.main(["doctor"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    told = [line.partition(":")[0] for line in lines]
    assert [name for name in told if name != "missing"] == ["versions", "GPU", "memory", "disk", "Hub", "launch"]
    assert torch.__version__ in lines[0]
    assert last == "`iet-finetune doctor --gpu` tries what runs and what fits."


def test_of_the_launcher_it_reads_the_configuration(launch_file):
    assert "has no configuration of its own" in told("launch")
    launch_file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 8\nmixed_precision: bf16\n"
        "use_cpu: false\ndebug: false\nnum_machines: 1\n"
    )
    assert told("launch") == f"launch: {launch_file}: 8 processes, MULTI_GPU, mixed precision bf16"
    launch_file.write_text("num_processes: [")
    assert f"{launch_file} cannot be read" in told("launch")


@pytest.mark.parametrize(
    ("offline", "token", "words"),
    [
        (True, None, "`HF_HUB_OFFLINE` is set"),
        (False, None, "not logged in: gated models and `--push_to_hub` need `hf auth login`"),
        (False, "hf_secret", "a login is stored"),
    ],
)
def test_of_the_hub_it_says_whether_there_is_a_login_and_never_what_it_is(monkeypatch, offline, token, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert words in told("Hub")
    assert "hf_secret" not in told("Hub")


def test_what_is_missing_is_named_with_what_it_is_for(monkeypatch):
    monkeypatch.setattr(machine, "OPTIONAL", {"torch": "all", "no_such_package": "`--a_flag`"})
    assert [line for line in about_machine() if line.startswith("missing")] == [
        "missing: no_such_package, for `--a_flag`"
    ]


@pytest.mark.parametrize("flags", [["--only", "flux"], ["--json", "there.json"]])
def test_flags_of_the_checks_alone_are_refused(capsys, flags):
    assert cli.main(["doctor", *flags]) == 2
    assert f"`{flags[0]}` goes with `--gpu`" in capsys.readouterr().err
