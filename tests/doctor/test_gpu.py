"""The checks of a GPU, as far as they go without one; what is checked is tested where it belongs."""

from typing import Any

import pytest
import torch

from iet_finetune import Config
from iet_finetune.cli import main
from iet_finetune.doctor import shapes
from iet_finetune.doctor.checks import Machine, NotHere
from iet_finetune.doctor.gpu import CHECKS
from iet_finetune.training import starting

BY_NAME = {check.name: check for check in CHECKS}
# What only a card can show; the others run a tiny model where there is none.
FOR_CARDS = {"agreement", "cudnn_attention", "transfers", "compile", "decoding", "out_of_memory"}
# `sdxl` goes the way of `flux`.
ELSEWHERE = {"eight_bits", "nccl", "sdxl"}
ON_CPU = sorted(set(BY_NAME) - FOR_CARDS - ELSEWHERE)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card: run `make gpu-check`")


@pytest.fixture
def machine(tmp_path):
    return Machine("cpu", tmp_path)


@pytest.mark.parametrize("name", ON_CPU)
def test_runs_without_a_card(name, machine):
    found: dict[str, Any] = {}
    BY_NAME[name].function(machine, found)
    assert found


@pytest.mark.parametrize("name", sorted(FOR_CARDS))
def test_says_that_it_needs_a_card(name, machine):
    with pytest.raises(NotHere, match="needs a card"):
        BY_NAME[name].function(machine, {})


def test_command_prints_a_table_and_writes_all_of_it(tmp_path, capsys):
    file = tmp_path / "found.json"
    assert main(["doctor", "--gpu", "--only", "card", "nccl", "transfers", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| check")
    assert [line.split(" | ")[1] for line in lines[2:5]] == ["passed, on a CPU", "passed, on a CPU", "not here"]
    assert lines[-1].startswith("3 checks, none failed. There is no GPU")
    assert '"backend": "gloo"' in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "--only", "card", "crad"], "`--only crad`: the checks are card, attention, cudnn_attention, steps"),
        (["--gpu", "--jsn", "x"], "unrecognized arguments: --jsn x"),
        (
            ["--gpu", "--json", "/nowhere/x.json"],
            "`--json /nowhere/x.json` cannot be written: No such file or directory.",
        ),
    ],
)
def test_wrong_flags_end_in_one_line(arguments, words, capsys):
    assert main(["doctor", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"iet-finetune: error: {words}")


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (shapes.sd15, 859_520_964),
        (shapes.sdxl, 2_567_463_684),
        (lambda device: shapes.flux(device, torch.bfloat16, double=19, single=38), 11_901_408_320),
    ],
    ids=["SD 1.5", "SDXL", "Flux"],
)
def test_pipelines_have_the_real_sizes(make, parameters):
    pipeline = make("meta")
    denoiser = pipeline.components.get("unet") or pipeline.components["transformer"]
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == parameters


def test_a_run_on_a_gpu_disables_cudnn_attention(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(starting, "disable_cudnn_attention", lambda: called.append(True))
    config = Config.from_flags(output_dir=str(tmp_path), report_to="none")
    starting.start_accelerator(config)
    assert not called
    monkeypatch.setattr(starting.Accelerator, "device", torch.device("cuda"))
    monkeypatch.setattr(starting, "check_card", lambda device, precision: None)
    starting.start_accelerator(config)
    assert called


def test_cudnn_attention_is_left_out():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        starting.disable_cudnn_attention()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
