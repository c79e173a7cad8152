"""Rules from outside: registered in one place, and their flags are everywhere that flags are."""

import contextlib
import io
from dataclasses import dataclass, make_dataclass

import pytest
import yaml

from iet_finetune import Config, UserError, register_merge_rule, register_sharding, register_skip_rule
from iet_finetune.config.config import all_flags, flag_names
from iet_finetune.config.flags import flag
from iet_finetune.config.identity import check_identity, common_flags, free_settings, run_identity
from iet_finetune.config.registry import MERGE_RULES, REGISTRIES, SHARDINGS, SKIP_RULES
from iet_finetune.families.smoke import shrink
from iet_finetune.publish.upload_list import public_flags

SOURCES = ("--pretrained_model_name_or_path", "sd", "--train_data_dir", "cats")


@pytest.fixture(autouse=True)
def only_those_of_the_package(monkeypatch):
    """What a test registers is gone after it."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "entries", dict(registry.entries))


@pytest.fixture
def rule() -> type:
    """A registered skip rule with three flags."""

    @register_skip_rule("reference")
    class BelowReference:
        @dataclass(frozen=True)
        class Config:
            reference_share: float = flag(0.8, "Skip below this share.", resume="fixed")
            reference_warmth: int = flag(3, "Changes the weights.", resume="free", smoke=1)
            reference_file: str | None = flag(None, "Lies on this machine.", resume="other", scope="local")

    return BelowReference


CHOSEN = ("--skip_rule", "reference", "--reference_share", "0.5")


def test_the_chosen_rules_are_those_of_the_package_unless_the_flags_say_otherwise(rule):
    entry, settings = Config().chosen(SKIP_RULES)
    assert (entry.name, settings) == ("agc", Config().agc)
    entry, settings = Config.from_command_line([*SOURCES, *CHOSEN]).chosen(SKIP_RULES)
    assert entry.load() is rule
    assert settings == rule.Config(reference_share=0.5)
    assert Config().chosen(SHARDINGS)[0].name == "iid"
    assert Config().chosen(MERGE_RULES)[1] is None


@pytest.mark.parametrize(
    "entry", [entry for registry in REGISTRIES for entry in registry.entries.values()], ids=lambda entry: entry.name
)
def test_the_rules_of_the_package_are_where_their_entries_say(entry):
    assert callable(entry.load())


def test_a_rule_of_each_kind_can_be_registered():
    assert register_sharding("halves")(lambda images, shards, seed: [])([], 2, 0) == []
    assert register_merge_rule("median", AFlag)(type("Median", (), {})).__name__ == "Median"
    config = Config.from_flags(shard_strategy="halves", merge_rule="median", warmth=4)
    assert config.chosen(SHARDINGS)[0].load()([], 2, 0) == []
    assert config.chosen(MERGE_RULES)[1] == AFlag(4)


def test_its_flags_are_in_help_under_a_title_of_their_own(rule):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        Config.from_command_line(["--help-all"])
    text = " ".join(shown.getvalue().split())
    assert "Skip rule reference: --reference_share FLOAT Skip below this share. (default: 0.8)" in text
    assert "--skip_rule {agc,guard,calibrated_agc,reference}" in text


def test_its_flags_are_keys_of_yaml_files_and_come_back(rule, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"skip_rule": "reference", "reference_share": 0.5}))
    config = Config.from_command_line([*SOURCES, "--config", str(file)])
    flags = config.to_flags()
    assert (flags["reference_share"], flags["reference_warmth"], flags["skip_rule"]) == (0.5, 3, "reference")
    assert Config.from_flags(**flags) == config == Config.from_command_line([*SOURCES, *CHOSEN])
    assert Config.from_flags() == Config()


def test_what_its_flags_mean_for_a_run_follows_from_their_facts(rule):
    config = Config.from_command_line([*SOURCES, *CHOSEN])
    identity = run_identity(config, "", "")
    assert (identity["`--skip_rule`"], identity["`--reference_share`"]) == ("reference", 0.5)
    assert "`--reference_warmth`" not in identity
    assert free_settings(config, "no")["reference_warmth"] == 3
    assert "`--reference_share`" in common_flags(config)
    with pytest.raises(UserError, match="`--reference_share` has changed"):
        check_identity(identity | {"`--reference_share`": 0.6}, identity, "checkpoint-1")


def test_what_a_push_publishes_of_its_flags_follows_from_their_facts(rule):
    flags = Config.from_command_line([*SOURCES, *CHOSEN, "--reference_file", "means/mine.pt"]).to_flags()
    published = public_flags(flags, ())
    assert {
        name: flags[name] for name in ("skip_rule", "reference_share", "reference_warmth")
    }.items() <= published.items()
    assert "means/mine.pt" not in published.values()


def test_a_smoke_run_sets_what_they_ask_for(rule, tmp_path):
    flags = {"model_config": "cifar10", "train_data_dir": "x", "skip_rule": "reference", "reference_warmth": 9}
    small = shrink(Config.from_flags(**flags), tmp_path)
    assert small.chosen(SKIP_RULES)[1] == rule.Config(reference_warmth=1)


def test_a_checkpoint_from_before_a_flag_was_made_with_its_default(rule):
    identity = run_identity(Config(), "", "")
    older = {name: value for name, value in identity.items() if name not in ("`--skip_rule`", "`--merge_rule`")}
    check_identity(older, identity, "checkpoint-1")
    with pytest.raises(UserError, match="`--skip_rule` has changed"):
        check_identity(older, run_identity(Config.from_flags(skip_rule="reference"), "", ""), "checkpoint-1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"reference_share": 0.5},
            "`--reference_share 0.5` does nothing with `--skip_rule agc`: leave it out.",
        ),
        (
            {"skip_rule": "reference", "agc_decay": 0.5},
            "`--agc_decay 0.5` does nothing with `--skip_rule reference`: leave it out.",
        ),
        (
            {"skip_rule": "refrence"},
            "`--skip_rule` must be one of agc, guard, calibrated_agc, reference, not 'refrence'.",
        ),
    ],
)
def test_a_flag_of_a_rule_that_is_not_chosen_is_refused(rule, flags, message):
    with pytest.raises(UserError) as caught:
        Config.from_flags(**flags)
    assert str(caught.value) == message


@dataclass(frozen=True)
class AFlag:
    warmth: int = flag(3, "How warm.", resume="fixed")


@dataclass(frozen=True)
class OfAGC:
    agc_decay: float = flag(0.8, "How slow.", resume="fixed")


@dataclass
class CanBeChanged:
    warmth: int = flag(3, "How warm.", resume="fixed")


def test_a_flag_without_facts_is_refused_where_its_rule_is_registered():
    group = make_dataclass("Group", [("warmth", int, flag(3, "How warm."))], frozen=True)
    with pytest.raises(TypeError, match="the flag `Group.warmth` must declare resume="):
        register_skip_rule("warm", group)(object)
    assert SKIP_RULES.names() == ("agc", "guard", "calibrated_agc")


@pytest.mark.parametrize("name", ["agc", "reference"])
def test_a_name_can_be_registered_once(rule, name):
    with pytest.raises(ValueError, match=f"there is a skip rule '{name}' already"):
        register_skip_rule(name)(object)


@pytest.mark.parametrize("group", [OfAGC, AFlag])
def test_a_flag_can_be_registered_once(group):
    register_skip_rule("warm", AFlag)(object)
    (name,) = group.__dataclass_fields__
    with pytest.raises(ValueError, match=f"merge rule 'other' has a flag `--{name}`, which exists already"):
        register_merge_rule("other", group)(object)
    assert "other" not in MERGE_RULES.names()


@pytest.mark.parametrize("group", [CanBeChanged, int])
def test_flags_that_are_no_frozen_dataclass_are_refused(group):
    with pytest.raises(TypeError, match="skip rule 'warm' must be the fields of a frozen dataclass"):
        register_skip_rule("warm", group)(object)


def test_flags_of_rules_come_last(rule):
    assert flag_names()[-3:] == list(all_flags())[-3:] == list(rule.Config.__dataclass_fields__)
