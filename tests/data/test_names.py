"""Folders are read whatever their names, or refused by name: never is another one read instead."""

import pytest
from data.made import load_all, refusal, simple_folder, table, write_folder

from iet_finetune.errors import UserError

ODD = ["a b", "exp:1e-4", "a::b", "#1", "50%20", "?q", "[new]", "{a,b}", "it's", '"z"', "*", "$HOME", "a\u0308", "\n"]
PATTERNS = ["a::b", "?q", "[new]", "*", "$HOME", "\n"]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_with_captions_is_read_whatever_its_name(tmp_path, monkeypatch, name, relative):
    monkeypatch.chdir(tmp_path)
    # What a pattern would match too.
    simple_folder(tmp_path / "aq" / "cats", 3, numbers=[7, 8, 9])
    expected = load_all(simple_folder(tmp_path / "plain", 3))
    simple_folder(tmp_path / name / "cats", 3)
    folder = f"{name}/cats" if relative else str(tmp_path / name / "cats")
    for flags in ({"folder": folder}, {"dataset_name": folder}):
        found = load_all(**flags)
        assert found.content_hashes == expected.content_hashes
        assert found.captions == expected.captions
        assert found.names == tuple(f"{folder}/{number:03}.png" for number in range(3))
        assert found.load(0).size == (10, 12)


@pytest.mark.parametrize("name", ODD)
def test_a_table_is_read_or_refused_by_name(tmp_path, name):
    for kind in ("aq", name):
        (tmp_path / kind / "cats").mkdir(parents=True)
        with open(tmp_path / kind / "cats" / "train.parquet", "wb") as file:
            table(3 if kind == name else 5).to_parquet(file)
    flags = {"dataset_name": str(tmp_path / name / "cats")}
    if name in PATTERNS:
        with pytest.raises(UserError, match="(?s)cannot be read by `datasets`.*rename that folder"):
            load_all(**flags)
    else:
        assert len(load_all(**flags)) == 3


def test_images_without_captions_are_not_taken_from_a_folder_that_the_name_matches(tmp_path):
    for name in ("aq", "?q"):
        write_folder(tmp_path / name / "train", {f"{number}.png": number for number in range(3)})
    message = refusal(dataset_name=str(tmp_path / "?q"), needs_captions=False)
    assert f"to which '?' in `{tmp_path}/?q` means something else" in message


def test_a_cache_that_datasets_would_make_elsewhere_is_refused(tmp_path):
    (tmp_path / "cats").mkdir()
    with open(tmp_path / "cats" / "train.parquet", "wb") as file:
        table(3).to_parquet(file)
    message = refusal(dataset_name=str(tmp_path / "cats"), cache_dir=str(tmp_path / "a::b"))
    assert message.startswith(f"`--cache_dir {tmp_path}/a::b` cannot be read by `datasets`")
    assert [path.name for path in tmp_path.iterdir()] == ["cats"]
