"""The paper's experiment: its plan is made of commands that exist and of figures that add up, and it runs in small."""

import os
import re
import shlex
import sys
from pathlib import Path

import processes
import pytest
import torch
from diffusers import UNet2DModel

from iet_finetune import Config
from iet_finetune.audit.flags import FLAGS
from iet_finetune.cli.audit_command import audit_parser
from iet_finetune.config.command_line import parse_arguments

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
SETS = ("cifar10", "cifar100", "afhq_dog", "laion10k")


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    """Lets a test import the benchmarks as they import each other."""
    monkeypatch.syspath_prepend(FOLDER)


def run_paper(*flags: str):
    command = [sys.executable, str(FOLDER / "paper.py"), *flags]
    return processes.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)


def planned(capsys, *flags: str) -> str:
    from paper import main

    assert main(list(flags)) == 0
    return capsys.readouterr().out


def check_command(line: str) -> None:
    """Raises a `UserError` unless the program that a line names accepts its flags."""
    program, *arguments = shlex.split(line)
    if program == "python":
        from heldout import read

        assert arguments.pop(0) == "benchmarks/heldout.py"
        read(arguments)
        return
    assert program == "iet-finetune"
    command, *arguments = arguments
    if command == "train":
        Config.from_command_line(arguments)
    else:
        assert command == "audit"
        given = parse_arguments(audit_parser(), arguments, [*FLAGS])
        Config.layered({name: value for name, value in given.items() if name != "model"})


@pytest.mark.parametrize("name", SETS)
def test_a_plan_is_made_of_commands_with_flags_that_exist_and_of_counted_needs(name, capsys):
    plan = planned(capsys, name, "--with_plain_steps")
    commands = [line for line in plan.splitlines() if line and not line.startswith("#")]
    for line in commands:
        check_command(line)
    programs = [" ".join(line.split()[:2]) for line in commands if not line.startswith("python")]
    assert programs == ["iet-finetune train", "iet-finetune audit"] * 3
    assert len(commands) - len(programs) == int(name.startswith("cifar"))
    needs = re.findall(r"([\d.]+) hours, ([\d.]+) GB of GPU memory", plan)
    assert len(needs) == 6
    for hours, memory in needs:
        assert float(hours) > 0
        assert 0.5 < float(memory) < 80
    (total,) = re.findall(r"Together ([\d.]+) hours", plan)
    assert float(total) == pytest.approx(sum(float(hours) for hours, _ in needs), abs=0.4)
    assert "counted, not measured" in plan


def test_a_slower_card_needs_more_hours_and_a_small_one_is_said_to_be_too_small(capsys, monkeypatch):
    from counted import CARDS, Card

    monkeypatch.setitem(CARDS, "tiny", Card(memory=1, bf16=989, tf32=494.5))
    cards = ("H100 80 GB", "RTX 4090 24 GB", "tiny")
    fast, slow, small = (planned(capsys, "cifar10", "--card", card) for card in cards)
    hours = [float(re.findall(r"Together ([\d.]+) hours", plan)[0]) for plan in (fast, slow, small)]
    assert hours[1] == pytest.approx(hours[0] * 494.5 / 82.6, rel=0.02)
    assert hours[2] == hours[0]
    assert [plan.count("MORE THAN THE 1 GB OF THIS CARD") for plan in (fast, slow, small)] == [0, 0, 4]


def recipe(name: str, *flags: str) -> Config:
    return Config.from_command_line(["--config", name, *flags])


def test_needs_grow_as_they_must():
    from counted import CARDS, audit_cost, training_cost

    once, twice = (training_cost(recipe("cifar10", "--num_train_epochs", str(n)), 50_000) for n in (500, 1000))
    assert twice.flops == 2 * once.flops
    assert (twice.device, twice.host) == (once.device, once.host)
    card = CARDS["H100 80 GB"]
    assert card.hours(twice.flops, False) == 2 * card.hours(once.flops, False)
    assert card.hours(once.flops, True) < card.hours(once.flops, False)
    # Twins: as many passes cost the same, whatever the number of clones; the moments of nine clones rest on the host.
    plain = training_cost(recipe("cifar10_plain"), 50_000)
    assert (plain.flops, plain.device) == (twice.flops, twice.device)
    assert plain.host < twice.host
    larger = training_cost(recipe("cifar10", "--train_batch_size", "256"), 50_000)
    assert larger.device > 1.5 * twice.device
    drawn = [audit_cost(recipe("cifar10"), num_images=n, num_inference_steps=5, eval_batch_size=8) for n in (10, 20)]
    assert drawn[1].flops == 2 * drawn[0].flops > 0


def test_checkpointing_saves_memory_and_costs_a_forward_pass():
    from counted import activations, training_cost

    with_, without = (
        training_cost(recipe("laion10k_sd21", flag), 9000)
        for flag in ("--gradient_checkpointing", "--no_gradient_checkpointing")
    )
    assert with_.flops == pytest.approx(without.flops * 4 / 3)
    assert with_.half
    assert with_.device < without.device
    config = recipe("laion10k_sd21")
    assert activations(config, 8, True) < activations(config, 8, False) / 2
    # The weights, gradients, moments and the average of 866 million parameters, in fp32.
    assert with_.device > 5 * 4 * 865_910_724


def test_images_are_counted_as_the_schedule_reads_them():
    from counted import images_seen, schedule

    for name in ("cifar10", "cifar10_plain", "afhq_dog", "laion10k_sd21_plain_steps"):
        plan = schedule(recipe(name, "--max_train_steps", "57"), 1003)
        by_step = sum(
            step.stop - step.start for shard in range(len(plan.shard_sizes)) for step in plan.steps(shard, 0, 57)
        )
        assert abs(images_seen(plan) - by_step) < plan.samples_per_step * len(plan.shard_sizes)
        passes = schedule(recipe("cifar10", "--num_train_epochs", "3"), 1003)
        assert images_seen(passes) == 3 * 1003


def test_the_arithmetic_is_that_of_the_formula():
    from counted import _forward_flops

    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    ).to("meta")

    def conv(into: int, out: int, kernel: int = 3) -> int:
        return 2 * 8 * 8 * kernel * kernel * into * out

    def block(into: int, out: int = 4, time: int = 16) -> int:
        shortcut = conv(into, out, 1) if into != out else 0
        return conv(into, out) + conv(out, out) + 2 * time * out + shortcut

    embedding = 2 * 4 * 16 + 2 * 16 * 16
    # One block down, two in the middle, two up, each of which also takes one of the two outputs of the way down.
    by_hand = embedding + conv(3, 4) + block(4) + 2 * block(4) + 2 * block(8) + conv(4, 3)
    assert _forward_flops(net, 8) == by_hand


def test_memory_is_that_of_the_tensors_that_live_at_once():
    from counted import Peak

    with torch.device("meta"):
        weight = torch.zeros(1000, requires_grad=True)
    with Peak() as peak, torch.no_grad():
        first = weight * 2
        second = first + 1
        del first
        third = second.view(10, 100).t()  # no memory of its own
        third.add_(1)
        del second, third
        _ = weight + 1
    assert peak.most == 2 * 4000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar100", "laion10k"])
def test_everything_runs_in_small_and_prints_the_table(name, tmp_path):
    done = run_paper(name, "--smoke", "--dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    ran = [line for line in lines if line.startswith("$ ")]
    assert [line.split()[2] for line in ran[-4:]] == ["train", "audit"] * 2
    assert len(ran) == (5 if name == "cifar100" else 4)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert table[0] == ["", "IET-AGC", "plain", "baseline", "IET-AGC minus plain", "lower by"]
    measures = {
        "cifar100": ["MQ at 0.3", "MQ at 0.4"],
        "laion10k": ["mean", "90th percentile", "95th percentile", "above 0.5"],
    }
    assert [row[0] for row in table[2:4]] == ["FD-made_up", "KID-made_up"]
    for row, words in zip(table[4:], measures[name], strict=True):
        assert words in row[0]
    for row in table[2:]:
        for cell in (row[1], row[2], row[4]):
            assert re.fullmatch(r"-?[\d.]+( %)? \[-?[\d.]+, -?[\d.]+\]", cell), row
        assert re.match(r"-?\d", row[3]), row
    assert "was not measured" not in done.stdout
    assert lines[-1].startswith("These numbers mean nothing")


def test_what_is_done_is_not_repeated_and_what_fails_ends_the_program(tmp_path, capsys):
    from paper import Step, run_steps

    def step(name: str, *flags: str) -> Step:
        return Step(name, "iet-finetune", flags, tmp_path / name)

    (tmp_path / "first").touch()
    steps = [step("first", "nothing"), step("second", "recipes"), step("third", "train"), step("fourth", "recipes")]
    assert run_steps(steps, here=True) == 2
    printed, said = capsys.readouterr()
    assert printed.splitlines()[0] == f"# done before, {tmp_path / 'first'} is there: iet-finetune nothing"
    assert printed.count("$ ") == 2
    assert said.splitlines()[-1] == (
        "paper.py: stopped by exit code 2 of `iet-finetune train`; the same command goes on from there"
    )


def test_a_step_in_a_process_of_its_own_ends_with_that_ones_exit_code(monkeypatch):
    import paper

    monkeypatch.setitem(
        paper.PROGRAMS, "program", ([sys.executable, "-c", "import sys; sys.exit(int(sys.argv[1]))"], int)
    )
    assert paper.Step("", "program", ("7",), Path("none")).run(here=False) == 7


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "SET is missing: give one of cifar10, cifar100, afhq_dog, laion10k."),
        (["cifar"], "SET `cifar` is unknown: .* Did you mean `cifar10`?"),
        (["cifar10", "--card", "H100"], "`--card H100` is unknown: give one of A100 40 GB"),
        (["cifar10", "--card", "H200 141 GB", "--smoke"], "`--card` does nothing where"),
        (["cifar10", "--sscd", "x"], "`--sscd` is for laion10k"),
        (["cifar10", "--fast"], "unrecognized arguments: --fast"),
        (["cifar10", "--run", "--smoke"], "not allowed with argument"),
        (["laion10k", "--run", "--sscd", "no/such.pt"], "`--sscd no/such.pt` is no file"),
        (["afhq_dog", "--run"], "`data/afhq/val/dog` is no folder"),
        (["cifar10", "--run"], "`--run` needs a GPU"),
    ],
)
def test_a_mistake_ends_in_one_line(flags, words, capsys, monkeypatch, tmp_path):
    from paper import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(flags) == 2
    printed, said = capsys.readouterr()
    assert printed == ""
    assert re.match(f"paper.py: error: .*{words}".replace("?", r"\?"), said), said
    assert len(said.splitlines()) == 1
