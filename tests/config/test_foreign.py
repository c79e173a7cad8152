"""What the flags of other trainers are here: every answer is true of our flags, and none is missing."""

import re
from pathlib import Path

import pytest

from iet_finetune.config.config import Config, all_flags, flag_names
from iet_finetune.config.flags import convert
from iet_finetune.config.foreign import TRAINERS, answer_to
from iet_finetune.config.foreign.answers import KINDS
from iet_finetune.config.foreign.page import page, table
from iet_finetune.errors import UserError

ROOT = Path(__file__).parents[2]
ANSWERS = {(key, name): answer for key, trainer in TRAINERS.items() for name, answer in trainer.flags.items()}
# All that the six scripts in `DIFFUSERS.source` add to their parsers, in the tag v0.40.0 of diffusers' repository.
SCRIPTS_OF_DIFFUSERS = (Path(__file__).parent / "flags_of_diffusers_0.40.0.txt").read_text(encoding="utf-8").split()


def test_every_flag_of_the_scripts_of_diffusers_has_an_answer():
    assert sorted(TRAINERS["diffusers"].flags) == SCRIPTS_OF_DIFFUSERS
    assert "diffusers 0.40.0" in TRAINERS["diffusers"].source


@pytest.mark.parametrize(("trainer", "name"), ANSWERS, ids="-".join)
def test_an_answer_is_true_of_our_flags(trainer, name):
    answer, own = ANSWERS[trainer, name], all_flags()
    assert answer.kind in KINDS
    assert (answer.kind == "same") == (name in own), "a flag that exists here is the same, perhaps with a note"
    if answer.kind == "renamed":
        ours, _, value = answer.ours.removeprefix("--").partition(" ")
        spec = own.get(ours) or own.get(ours.removeprefix("no_"))
        assert ours == "config" or spec is not None
        assert not value or convert(spec, value, "") == Config.from_flags(**{ours: value}).to_flags()[ours]
    else:
        assert not answer.ours
        assert answer.note or answer.kind == "same", "without a reason, or what to do instead, it is no answer"


@pytest.mark.parametrize(("trainer", "name"), ANSWERS, ids="-".join)
def test_an_answer_fits_into_a_line_of_several_and_names_only_flags_that_exist(trainer, name):
    answer = ANSWERS[trainer, name]
    assert ";" not in answer.note
    assert "|" not in answer.note
    assert not answer.note.endswith(".")
    assert len(answer.note) < 120
    for flag in re.findall(r"--(\w+)", answer.text):
        assert flag.removeprefix("no_") in {*flag_names(), "config"}, flag


def test_a_flag_that_two_trainers_have_is_one_flag_of_ours():
    for name in {name for _, name in ANSWERS}:
        of_all = [trainer.flags[name] for trainer in TRAINERS.values() if name in trainer.flags]
        assert len({(answer.kind, answer.ours.split(" ")[0]) for answer in of_all}) == 1, name


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_counts_otherwise_here_is_said(trainer):
    flags = TRAINERS[trainer].flags
    assert "of each clone, so give your number as `--total_train_steps`" in flags["max_train_steps"].note
    assert "steps of each clone" in flags["lr_warmup_steps"].note
    assert flags["train_batch_size"].note


def test_an_answer_is_found_by_name_however_it_is_written():
    assert answer_to("network_dim") is answer_to("network-dim") is TRAINERS["kohya"].flags["network_dim"]
    assert answer_to("lora_rank").ours == "--rank"
    assert answer_to("num_shards") is None


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_table_for_a_terminal_has_every_flag_with_its_answer(trainer):
    lines = table(trainer).splitlines()
    assert max(map(len, lines)) <= 119
    named = {word for line in lines for word in line.split() if word.startswith("--")}
    assert {f"--{name}" for name in TRAINERS[trainer].flags} <= named
    text = " ".join(table(trainer).split())
    for answer in TRAINERS[trainer].others():
        assert answer.text.replace("`", "") in text


def test_the_page_in_docs_says_the_same():
    written = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    assert written == page(), "run `python -m iet_finetune.config.foreign.page > docs/coming-from.md`"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_help_from_prints_the_table_and_ends_well(trainer, capsys):
    with pytest.raises(SystemExit) as stop:
        Config.from_command_line(["--help-from", trainer])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"{table(trainer)}\n"


def test_help_from_an_unknown_trainer_names_those_that_are_known():
    with pytest.raises(
        UserError, match="`--help-from` must be one of diffusers, kohya, simpletuner, not 'onetrainer'"
    ):
        Config.from_command_line(["--help-from", "onetrainer"])
