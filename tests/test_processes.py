"""A forked process of `processes` is to its program what a new one is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest

# Prints what a program can see of its place.
LOOK = """
import json, os, signal, sys, threading
print(json.dumps({
    "name": __name__, "words": sys.argv, "path": sys.path, "folder": os.getcwd(), "own": os.getpid() == os.getsid(0),
    "environment": {**os.environ}, "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "parent": os.getppid(), "threads": threading.active_count(),
    "package": sorted(name for name in sys.modules if name.startswith("iet_finetune")), "code": __import__("x").code,
}))
print("seen", file=sys.stderr)
sys.exit(7)
"""
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere every process is a new one")


@linux
@pytest.mark.parametrize("words", [["-c", LOOK, "a", "-b"], ["look.py", "a"], ["-m", "look", "--a"]], ids=str)
def test_a_program_sees_what_it_sees_in_a_new_process_and_ends_like_it(tmp_path, words):
    (tmp_path / "look.py").write_text(LOOK)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x.py").write_text("code = 5")
    settings = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(tmp_path / "there"), "RANK": "3"}}
    command = [sys.executable, *(words if words[0] != "look.py" else [str(tmp_path / "look.py"), "a"])]
    forked = processes.run(command, start_new_session=True, **settings)
    new = subprocess.run(command, start_new_session=True, capture_output=True, text=True, check=False, **settings)
    assert (forked.returncode, forked.stdout, forked.stderr) == (new.returncode, new.stdout, new.stderr) != (0, "", "")


# Prints which libraries it has and where it looks for the Hub.
LIBRARIES = """
import sys
print(*(name in sys.modules for name in ("torch", "diffusers", "iet_finetune")))
from huggingface_hub import HfApi
print(HfApi().endpoint)
"""


@linux
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "True True False"),
        ({"HF_ENDPOINT": "http://localhost"}, "True False False"),
        ({"TORCH_SHOW_CPP_STACKTRACES": "1"}, "False False False"),
    ],
    ids=["all", "not those of the Hub", "none"],
)
def test_it_has_the_libraries_already_but_those_that_read_other_variables(variables, said):
    done = processes.run([sys.executable, "-c", LIBRARIES], env={**os.environ, **variables})
    assert done.stdout.splitlines() == [said, variables.get("HF_ENDPOINT", "https://huggingface.co")]


# Starts another program as launchers do, and ends with its code.
LAUNCH = """
import subprocess, sys
print(1, flush=True)
command = (sys.executable, "-u", "-c", "import sys; print('torch' in sys.modules, sys.argv); sys.exit(5)", "a")
sys.exit(subprocess.run(command, start_new_session=True).returncode)
"""


@linux
@pytest.mark.parametrize("launcher", [True, False])
def test_what_a_launcher_starts_is_forked_too_if_that_is_wanted(launcher):
    done = processes.run([sys.executable, "-c", LAUNCH], launcher=launcher)
    assert (done.returncode, done.stdout, done.stderr) == (5, f"1\n{launcher} ['-c', 'a']\n", "")


@linux
def test_a_launcher_may_start_another():
    twice = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    done = processes.run([sys.executable, "-c", twice, LAUNCH], launcher=True)
    assert (done.returncode, done.stdout, done.stderr) == (5, "1\nTrue ['-c', 'a']\n", "")


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("pass", 0),
        ("1 / 0", 1),
        ("import atexit, os; atexit.register(os._exit, 9)", 9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
    ],
)
def test_it_ends_by_code_error_and_signal(code, ending):
    done = processes.run([sys.executable, "-c", code])
    assert done.returncode == ending
    assert done.stderr.splitlines()[-1:] == {1: ["ZeroDivisionError: division by zero"]}.get(
        ending, ["KeyboardInterrupt"] if ending == -signal.SIGINT else []
    )


def test_a_running_one_is_watched_and_ended_like_any_child(tmp_path):
    code = "import pathlib, time; pathlib.Path('here').touch(); print('running', flush=True); time.sleep(60)"
    with processes.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "running\n"
        assert Path(tmp_path, "here").exists()
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
        process.terminate()
        assert process.wait(timeout=30) == -signal.SIGTERM
