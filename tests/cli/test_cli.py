"""The console command: how it answers, and how a run ends for the person at the terminal."""

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from iet_finetune import __version__, cli
from iet_finetune.cli.program import COMMANDS
from iet_finetune.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, "train_iet_agc.py"]
COMMAND = [sys.executable, "-m", "iet_finetune", "train"]


def finish(*command: str) -> subprocess.CompletedProcess:
    """A command run to its end in the repository's root."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def raises(error: BaseException):
    """A function that raises `error`."""

    def function() -> None:
        raise error

    return function


def the_error(capsys) -> str:
    """The one line on stderr, without its line end; nothing may stand on stdout."""
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.endswith("\n")
    assert len(shown.err.splitlines()) == 1
    return shown.err.removesuffix("\n")


def test_help_lists_every_command_with_one_line(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        (line,) = (line for line in shown.splitlines() if line.startswith(f"  {name} "))
        assert len(line.split(maxsplit=1)[1]) > 10
    assert len(shown.splitlines()) < len(COMMANDS) + 8


def test_a_result_that_nobody_reads_on_ends_the_command_silently():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "iet_finetune", "recipes"]
    ended = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


def test_version_is_the_package_s(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"iet-finetune {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["trian"], "unknown command `trian`. Did you mean `train`?"),
        (["xyzzy"], "unknown command `xyzzy`. `iet-finetune --help`"),
        ([], "`iet-finetune train --config FILE`"),
        (["--config", "x.yaml"], "`iet-finetune train --config FILE`"),
        (["train", "--num_shard", "3"], "unknown flag `--num_shard`. Did you mean `--num_shards`?"),
        (["train", "--num_shards", "0"], "`--num_shards` must be at least 1"),
        (["push", "no-such-folder"], "no-such-folder"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line_and_code_2(capsys, argv, part):
    assert cli.main(argv) == 2
    line = the_error(capsys)
    assert line.startswith("iet-finetune: error: ")
    assert part in line


def test_a_function_that_ends_well_gives_code_0(capsys):
    assert cli.run(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


def test_an_error_of_the_user_is_one_line_even_with_a_line_break_in_a_file_name(capsys):
    assert cli.run(raises(UserError("`a\nb.png` is not an image."))) == 2
    assert the_error(capsys) == "iet-finetune: error: `a b.png` is not an image."


def test_an_interrupt_says_how_to_go_on(capsys):
    assert cli.run(raises(KeyboardInterrupt())) == 130
    assert "`--resume_from_checkpoint latest` goes on" in the_error(capsys)


@pytest.mark.parametrize(
    ("module", "warning"),
    [
        ("utils.import_utils", "`CLIPImageProcessor` requires torchvision (not installed); falling back"),
        ("tokenization_utils_base", "Token indices sequence length is longer than the specified maximum (17 > 16)."),
    ],
)
def test_what_transformers_says_to_nobody_here_is_not_shown_but_its_other_warnings_are(caplog, module, warning):
    log = logging.getLogger(f"transformers.{module}")
    assert cli.run(lambda: log.warning(warning)) == 0
    assert cli.run(lambda: log.warning("something else")) == 0
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: print(1 / 0))
    with pytest.raises(PermissionError):
        cli.run(raises(PermissionError(errno.EACCES, "Permission denied", "x")))


def test_a_device_out_of_memory_is_one_line(capsys):
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB\nand more"
    assert cli.run(raises(torch.OutOfMemoryError(said)), "go on") == 2
    assert the_error(capsys) == (
        "iet-finetune: error: CUDA out of memory. Tried to allocate 2.00 GiB; lower batch size or resolution, or free "
        "the device (go on)."
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_full_disk_is_one_line(capsys):
    def fill() -> None:
        with open("/dev/full", "wb") as file:
            file.write(b"weights")

    assert cli.run(fill) == 2
    line = the_error(capsys)
    assert line.startswith("iet-finetune: error: no space left on the device; free some")
    assert "`--resume_from_checkpoint latest` goes on" in line


@pytest.mark.parametrize(
    ("names", "named"),
    [(["new.bin"], "new.bin"), (["old.bin", None, "new.bin"], "new.bin")],
    ids=["written", "copied"],
)
def test_a_full_disk_names_the_file_that_was_to_be_written(names, named, capsys):
    assert cli.run(raises(OSError(errno.ENOSPC, "No space left on device", *names))) == 2
    assert the_error(capsys).startswith(f"iet-finetune: error: no space left on the device for '{named}'; free some")


def test_a_full_disk_is_recognised_behind_another_error(capsys):
    def fill() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")
        except OSError as error:
            raise RuntimeError("cannot save") from error

    assert cli.run(fill) == 2
    assert "no space left on the device for 'model.safetensors'" in the_error(capsys)


def test_a_full_disk_is_recognised_in_the_words_of_safetensors(capsys):
    # What `save_file` raises on a full disk: an exception of its own, without errno.
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert cli.run(raises(SafetensorError(words))) == 2
    assert "no space left on the device" in the_error(capsys)


def test_a_used_up_quota_is_one_line_too(capsys):
    assert cli.run(raises(OSError(errno.EDQUOT, "Disk quota exceeded", "model.safetensors"))) == 2
    assert "disk quota exceeded for 'model.safetensors'" in the_error(capsys)


@pytest.mark.parametrize("command", [SCRIPT, COMMAND], ids=["script", "command"])
def test_the_script_and_the_command_take_the_same_flags(command):
    shown = finish(*command, "--help-all")
    assert shown.returncode == 0
    assert "--agc_threshold" in shown.stdout
    wrong = finish(*command, "--agc_treshold", "0.5")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr == "iet-finetune: error: unknown flag `--agc_treshold`. Did you mean `--agc_threshold`?\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--help-all"],
        ["train", "--help-from", "kohya"],
        ["train", "--num_shards", "0"],
        ["push", "--help"],
        ["push", "nowhere"],
    ],
)
def test_help_and_wrong_flags_are_answered_without_torch(argv):
    code = f"""
import sys
from iet_finetune.cli import main
try:
    main({argv!r})
except SystemExit:
    pass
print("torch" in sys.modules, "iet_finetune.cli.program" in sys.modules)
"""
    assert finish(sys.executable, "-c", code).stdout.splitlines()[-1] == "False True"


def test_ctrl_c_ends_a_process_with_one_line_and_code_130():
    code = """
import sys, time
from iet_finetune.cli import run
def wait():
    print("waiting", flush=True)
    time.sleep(60)
sys.exit(run(wait))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=30)
    assert process.returncode == 130
    assert len(shown.splitlines()) == 1
    assert "`--resume_from_checkpoint latest`" in shown
