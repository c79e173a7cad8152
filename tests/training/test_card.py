"""A GPU that is not to be had, or cannot compute as it is asked to, is one line."""

import os

import pytest
import torch

from iet_finetune import Config, UserError
from iet_finetune.doctor.machine import about_machine
from iet_finetune.training import starting
from iet_finetune.training.card import check_card

CARD = torch.device("cuda", 0)
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
NONE = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be asynchronously"
GB = 10**9


def raises(error: Exception):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.fixture
def made_for_cuda(monkeypatch):
    """torch as it comes for GPUs, on a machine where it finds none; its first use says so."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda said: monkeypatch.setattr(torch.cuda, "init", raises(RuntimeError(said)))


def started(tmp_path, **flags):
    return starting.start_accelerator(Config.from_flags(output_dir=str(tmp_path), report_to="none", **flags))


def test_a_driver_that_is_too_old_is_one_line_and_not_a_run_on_the_cpu(made_for_cuda, tmp_path, monkeypatch):
    made_for_cuda(TOO_OLD)
    with pytest.raises(
        UserError, match=r"^The NVIDIA driver on your system is too old \(found version 11040\): "
    ) as it:
        started(tmp_path)
    assert "CUDA 13.0. Update the driver" in str(it.value)
    assert any(line == f"GPU: {it.value}" for line in about_machine())
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    started(tmp_path)


def test_without_a_gpu_a_run_is_on_the_cpu(made_for_cuda, tmp_path):
    made_for_cuda(NONE)
    assert started(tmp_path).device.type == "cpu"


def test_a_card_that_another_process_has_to_itself_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(starting, "Accelerator", raises(RuntimeError(BUSY)))
    with pytest.raises(UserError, match=r"busy or unavailable\): another process .* `CUDA_VISIBLE_DEVICES`\.$"):
        started(tmp_path)
    monkeypatch.setattr(torch.cuda, "mem_get_info", raises(RuntimeError(BUSY)))
    with pytest.raises(UserError, match="busy or unavailable"):
        check_card(CARD, "no")
    monkeypatch.setattr(starting, "Accelerator", raises(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        started(tmp_path)


def test_a_card_without_bf16_and_one_that_others_use_are_a_line_each(monkeypatch, capsys):
    free = [20 * GB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 24 * GB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    check_card(CARD, "fp16")
    with pytest.raises(
        UserError, match="`--mixed_precision bf16`: Tesla T4 has no bf16.* use `--mixed_precision fp16`"
    ):
        check_card(CARD, "bf16")
    assert capsys.readouterr().err == ""
    free[0] = 3 * GB
    check_card(CARD, "fp16")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: only 3.00 GB of the 24.00 GB of Tesla T4 are free: other programs have the rest")


def test_a_cpu_is_not_looked_at():
    check_card(torch.device("cpu"), "bf16")


@pytest.mark.parametrize(("ranks", "expected"), [("1", "1"), ("2", "0")])
def test_nccl_does_not_end_one_of_several_ranks_before_it_has_said_why(ranks, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as torchrun sets it
    monkeypatch.setenv("WORLD_SIZE", ranks)
    found = []

    def accelerator(**settings):
        found.append(os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"])
        raise ValueError("enough")

    monkeypatch.setattr(starting, "Accelerator", accelerator)
    with pytest.raises(UserError, match="enough"):
        started(tmp_path)
    assert found == [expected]
