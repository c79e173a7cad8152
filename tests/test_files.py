"""Files and folders are complete or absent."""

import pytest

from iet_finetune import UserError
from iet_finetune.files import clean, no_space_named, remove_folder, replaced_folder, written_beside


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    with written_beside(tmp_path / "a.txt") as partial:
        partial.write_text("new")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "new"
    with pytest.raises(TypeError), written_beside(tmp_path / "a.txt") as partial:
        print("half", file=partial.open("w"), sep=0)
    assert (tmp_path / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_moved_aside_comes_back_unless_the_new_one_stands(tmp_path):
    (tmp_path / ".unet.replaced").mkdir()
    (tmp_path / ".unet.replaced" / "old").touch()
    clean(tmp_path)
    assert names(tmp_path) == ["old", "unet"]
    (tmp_path / ".unet.replaced").mkdir()
    clean(tmp_path)
    assert names(tmp_path) == ["old", "unet"]


def test_what_was_half_written_or_half_removed_is_cleaned_away(tmp_path):
    (tmp_path / ".x.partial" / "deep").mkdir(parents=True)
    (tmp_path / ".y.partial").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".z.partial").touch()
    clean(tmp_path)
    assert names(tmp_path) == [".z.partial", "mine"]


def test_a_replaced_folder_has_only_the_new_content(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "old").touch()
    (tmp_path / "new").mkdir()
    with replaced_folder(tmp_path / "unet"):
        (tmp_path / "new").rename(tmp_path / "unet")
    assert names(tmp_path) == ["unet"]


def test_a_removed_folder_is_gone(tmp_path):
    (tmp_path / "checkpoint-1" / "deep").mkdir(parents=True)
    remove_folder(tmp_path / "checkpoint-1")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("... (os error 28): No space left on device")]
)
def test_a_full_disk_is_named_with_what_was_written(tmp_path, error):
    with (
        pytest.raises(UserError, match="no space left on the device.*while writing .*thing"),
        no_space_named(tmp_path / "thing"),
    ):
        raise error


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(KeyError), no_space_named(tmp_path):
        raise KeyError
