"""The output folder is one run's at a time, and a pipeline gets into it as a whole."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from iet_finetune import UserError
from iet_finetune.files import LOCK_NAME, FolderLock
from iet_finetune.publish.outputs import check_space, claim, publish


def test_a_folder_in_use_is_refused_until_it_is_released(tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(UserError, match="is in use by another run"):
        FolderLock(tmp_path, patience=0.3)
    lock.release()
    FolderLock(tmp_path, patience=0.0).release()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_does_not_lock_its_folder_for_ever(tmp_path):
    code = (
        "import pathlib, sys, time; from iet_finetune.publish.outputs import FolderLock;"
        "lock = FolderLock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError):
        FolderLock(tmp_path, patience=0.0)
    holder.kill()
    holder.wait()
    FolderLock(tmp_path, patience=5.0).release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_holds_nothing_up(tmp_path, monkeypatch):
    def not_there(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", not_there)
    locks = [FolderLock(tmp_path, patience=0.0) for _ in range(2)]
    assert list(tmp_path.iterdir()) == [], "a mark that a killed run leaves would lock the folder for ever"
    for lock in locks:
        lock.release()


def test_a_folder_with_nothing_but_the_lock_of_a_killed_run_is_empty(tmp_path):
    (tmp_path / LOCK_NAME).touch()
    claim(tmp_path, resuming=False).release()


def test_claiming_makes_the_folder_and_removes_only_what_an_interrupted_run_left(tmp_path):
    folder = tmp_path / "deep" / "out"
    claim(folder, resuming=False).release()
    (folder / "training_config.yaml").touch()
    (folder / ".checkpoint-3.partial").mkdir()
    (folder / "validation").mkdir()
    (folder / "validation" / ".round-0000.png.partial").touch()
    claim(folder, resuming=True).release()
    assert sorted(path.name for path in folder.rglob("*")) == ["training_config.yaml", "validation"]


@pytest.mark.parametrize("resuming", [False, True])
def test_a_folder_of_other_things_is_left_as_it_is(tmp_path, resuming):
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".mine.partial").touch()
    with pytest.raises(UserError, match="is not empty"):
        claim(tmp_path, resuming)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.partial", "notes.txt"]


def test_a_published_pipeline_replaces_the_old_one_whole(tmp_path):
    def save(folder):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "new").touch()
        (folder / "model_index.json").write_text("new")

    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "old").touch()
    (tmp_path / "model_index.json").write_text("old")
    publish(tmp_path, save)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model_index.json", "new", "unet"]
    assert (tmp_path / "model_index.json").read_text() == "new"


def test_a_pipeline_that_cannot_be_saved_leaves_the_old_one(tmp_path):
    (tmp_path / "model_index.json").write_text("old")

    def save(folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="no space left"):
        publish(tmp_path, save)
    assert [path.name for path in tmp_path.iterdir()] == ["model_index.json"]


def test_a_disk_that_is_too_small_is_named_with_both_numbers(tmp_path):
    check_space(tmp_path, 1)
    with pytest.raises(UserError, match=r"some 1000000000.00 GB, and .* GB are free"):
        check_space(tmp_path, 10**18)
