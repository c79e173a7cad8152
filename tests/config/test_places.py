"""Files and folders reach the configuration as their owner means them, and a wrong one is told at once."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml

from iet_finetune import cli
from iet_finetune.config.config import Config, all_flags
from iet_finetune.config.folders import check_folders
from iet_finetune.config.identity import run_identity
from iet_finetune.errors import UserError
from iet_finetune.publish.upload_list import public_flags

SOURCES = ("--pretrained_model_name_or_path", "sd", "--train_data_dir", "cats")
PLACES = sorted(spec.name for spec in all_flags().values() if spec.is_place)
# Flags without which a place is refused.
NEEDED = {"class_data_dir": {"class_prompt": "a dog"}, "init_lora": {"use_lora": True}}
ODD = ["exp:1e-4", "a b", "#1", "50%20", "?", "[x]", "{a,b}", 'it\'s "it"', "a::b", "s3://x", "$HOME", "a~"]
ODD += [unicodedata.normalize(form, "ä") for form in ("NFC", "NFD")]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def message_of(function, *arguments, **keywords) -> str:
    """The message of the `UserError` that a call raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_every_flag_that_may_name_a_file_or_folder_counts_as_a_place():
    assert (
        sorted(
            [
                *(
                    "base_config",
                    "cache_dir",
                    "class_data_dir",
                    "clip_model",
                    "dataset_name",
                    "features",
                    "generated_dir",
                ),
                *("holdout_data_dir", "init_lora"),
                *(
                    "logging_dir",
                    "model_config",
                    "offload_dir",
                    "output_dir",
                    "pretrained_model_name_or_path",
                    "prompts",
                ),
                *("reference_model", "resume_from_checkpoint", "train_data_dir"),
            ]
        )
        == PLACES
    )


@pytest.mark.parametrize("name", PLACES)
def test_a_tilde_is_the_home_folder_wherever_it_is_written(home, name):
    value = ["~/a b"] if all_flags()[name].many else "~/a b"
    file = home / "run.yaml"
    flags = {name: value, **NEEDED.get(name, {})}
    file.write_text(yaml.safe_dump(flags), encoding="utf-8")
    ways = {
        "python": Config.from_flags(**flags),
        "file": Config.layered({"config": "~/run.yaml"}),
        "command line": Config.layered(flags),
        "below": Config.layered({}, flags),
    }
    expected = [f"{home}/a b"] if all_flags()[name].many else f"{home}/a b"
    assert {way: config.to_flags()[name] for way, config in ways.items()} == dict.fromkeys(ways, expected)


def test_a_tilde_behind_an_equals_sign_which_the_shell_leaves_is_the_home_folder_too(home):
    config = Config.from_command_line([*SOURCES, "--output_dir=~/out", "--cache_dir=~", "--offload_dir=~root/x"])
    assert config.training.output_dir == f"{home}/out"
    assert config.model.cache_dir == str(home)
    assert config.ensemble.offload_dir == os.path.expanduser("~root/x") != "~root/x"


@pytest.mark.parametrize("name", ODD)
def test_any_other_name_stays_as_it_was_typed(name):
    for folder in (name, f"x/{name}/y", f"/x/{name}"):
        config = Config.from_command_line([*SOURCES, f"--output_dir={folder}"])
        assert config.training.output_dir == folder
    assert Config.from_flags(tracker_project_name=f"~/{name}").logging.tracker_project_name == f"~/{name}"


def test_a_path_of_pathlib_is_as_good_as_its_text(home):
    config = Config.from_flags(output_dir=Path("~/out"), train_data_dir=Path("cats"), features=[Path("sscd.pt")])
    assert (config.training.output_dir, config.data.train_data_dir) == (f"{home}/out", "cats")
    assert config.audit.features == ("sscd.pt",)
    assert "`--tracker_project_name` must be of type str" in message_of(
        Config.from_flags, tracker_project_name=Path("x")
    )


@pytest.mark.parametrize("name", PLACES)
def test_an_empty_place_is_refused_by_name(name):
    assert message_of(Config.from_flags, **{name: ""}).startswith(f"`--{name}` is empty")


@pytest.mark.parametrize(
    ("value", "named"),
    [("~nobody-here/x", "there is no user 'nobody-here'"), ("a\0b", "'a\\x00b'"), ("a\udce4", "'a\\udce4'")],
)
def test_what_can_be_no_path_is_refused(value, named):
    message = message_of(Config.from_flags, output_dir=value)
    assert message.startswith("`--output_dir` ")
    assert named in message
    message.encode()


def test_how_a_folder_is_spelled_changes_neither_the_run_nor_what_is_published(home, monkeypatch):
    monkeypatch.chdir(home)
    spelled = [
        Config.from_flags(train_data_dir=f"{each}cats", dataset_name=None, output_dir=f"{each}out")
        for each in ("~/", f"{home}/", "")
    ]
    assert spelled[0] == spelled[1] != spelled[2]
    assert len({str(run_identity(config, "data", "model")) for config in spelled}) == 1
    public = [public_flags(config.to_flags(), []) for config in spelled]
    assert public[0] == public[1] == public[2]
    assert not {"train_data_dir", "output_dir"} & public[0].keys()


def test_a_wrong_folder_is_told_before_torch_is_imported(home):
    (home / "file").write_text("mine")
    arguments = [*SOURCES, "--output_dir=~/file"]
    code = f"import sys; from iet_finetune import cli; code = cli.main(['train', *{arguments}]); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(code, 'torch' in sys.modules)"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert done.stdout == "2 False\n"
    assert done.stderr == (
        f"iet-finetune: error: `--output_dir {home}/file` cannot be written: it is a file. Choose another folder.\n"
    )


def test_folders_that_are_wrong_are_named_and_nothing_is_made(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "file").write_text("mine")
    (home / "cats").mkdir()
    right = {"output_dir": "new/out: 1", "train_data_dir": "~/cats"}
    check_folders(Config.from_flags(**right))
    wrong = [
        ({"output_dir": "file"}, "`--output_dir file` cannot be written: it is a file."),
        ({"output_dir": "file/out/x"}, f"`--output_dir file/out/x` cannot be written: `{home}/file` is a file."),
        ({"train_data_dir": "cast"}, "`--train_data_dir cast` is not a folder."),
        ({"holdout_data_dir": "~/cast"}, f"`--holdout_data_dir {home}/cast` is not a folder."),
    ]
    for changes, said in wrong:
        assert message_of(check_folders, Config.from_flags(**right | changes)).startswith(said)
    assert sorted(path.name for path in home.iterdir()) == ["cats", "file"]
    check_folders(Config.from_flags(smoke=True, train_data_dir="not-needed"))


def test_a_place_where_this_user_may_not_write_is_named(home, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != home)
    said = message_of(check_folders, Config.from_flags(output_dir="~/new/out"))
    assert said.startswith(f"`--output_dir {home}/new/out` cannot be written: `{home}` does not let this user write.")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["merge", "~/a", "--output", "x"], "`{home}/a` does not exist"),
        (["merge", "cats", "--output=~/file/x"], "cannot be made in"),
        (["push", "~/run"], "OUTPUT `{home}/run` is not a folder"),
        (["audit", "--compare", "~/a", "~/b"], "`--compare {home}/a`: there is no such file"),
        (["train", "--config=~/run.yaml"], "`--config ~/run.yaml` cannot be read: there is no such file or recipe"),
        (["train", "--config="], "`--config` is empty"),
        (["audit", "--model="], "`--model` is empty"),
        (["push", ""], "OUTPUT is empty"),
    ],
)
def test_every_command_knows_the_home_folder(home, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(home)
    (home / "file").write_text("mine")
    (home / "cats").mkdir()
    (home / "cats" / "config.json").write_text("{}")
    assert cli.main(argv) == 2
    assert said.format(home=home) in capsys.readouterr().err
