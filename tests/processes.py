"""Starts Python programs as processes of their own, forked from one that has imported the libraries, not the package.

That import takes some ten seconds of a core, longer than most of what tests do in a process. From the fork on a
program lives, and ends, as any does: with arguments, environment, folder, files, signals and modules of its own. Where
its environment differs in what the Hub's libraries read at their import, it is forked from a process that has imported
the others; where it differs in what those read, or forking is not safe, it is started anew. A launcher may be given a
process of its own to fork from, so that the programs that it starts need not import either.
"""

import contextlib
import functools
import gc
import importlib
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What training and an audit of Stable Diffusion import that does not read the Hub's variables: most of the time.
OTHERS = (
    *("torch.distributed.nn", "torch.utils.tensorboard", "torch._dynamo", "scipy.linalg", "scipy.io", "scipy.stats"),
    *("pandas", "pyarrow.parquet", "PIL.ImageDraw", "jinja2", "yaml"),
)
# And all that they import.
LIBRARIES = (
    *(*OTHERS, "datasets", "accelerate", "peft", "safetensors.torch", "diffusers.optimization"),
    *("diffusers.training_utils", "diffusers.loaders.single_file", "diffusers.guiders", "huggingface_hub.hf_api"),
    *("diffusers.pipelines.ddpm.pipeline_ddpm", "transformers.models.clip.tokenization_clip"),
    *("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "transformers.models.clip.modeling_clip"),
    *("diffusers.pipelines.stable_diffusion.safety_checker", "transformers.models.clip.image_processing_pil_clip"),
)
# The processes from which others are forked, by what they have imported; the first that may be is taken.
IMPORTED = {"all": LIBRARIES, "others": OTHERS}
# How the names begin of variables that these, or Python itself, read no later than at their import.
READ_BY_HUB = ("DIFFUSERS_", "HF_", "HOME", "HUGGING", "TRANSFORMERS_")
READ_BY_OTHERS = ("OMP_", "PYTHON", "TMPDIR", "TORCH_")
# Of those, some that are read later: torchrun sets one for its ranks.
READ_LATER = ("PYTHONPATH", "TORCH_NCCL_ASYNC_ERROR_HANDLING")
LARGEST_REQUEST = 1 << 18
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

_start_anew = subprocess.Popen._execute_child
_parameters = inspect.signature(_start_anew)
_environment = dict(os.environ)
# Those of `IMPORTED` that this process may have something forked from.
_available = tuple(IMPORTED)


class Popen(subprocess.Popen):
    """`subprocess.Popen`, which forks a command of this Python with a script, `-m` and a module, or `-c` and code.

    `launcher` is whether the processes that it starts in turn are forked, too, and those that they start.
    """

    launcher = False

    def __init__(self, *arguments: Any, launcher: bool = False, **settings: Any) -> None:
        self.launcher = launcher
        super().__init__(*arguments, **settings)

    def _execute_child(self, *given: Any) -> None:
        call = _parameters.bind(self, *given).arguments
        command, environment = call["args"], dict(os.environ if call["env"] is None else call["env"])
        plain = isinstance(command, list | tuple) and len(command) > 1 and not call["shell"] and not call["preexec_fn"]
        imported = _may_be_forked_from(environment) if plain and command[0] == sys.executable else None
        if imported is None:
            _start_anew(self, *given)
            return
        pipes = [call[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        # Where a pipe is missing, the process has the standard file of this one.
        files = [file if file != -1 else standard for standard, file in enumerate((pipes[0], pipes[3], pipes[5]))]
        request = {"words": [str(word) for word in command[1:]], "environment": environment}
        request |= {"folder": os.fspath(call["cwd"] or os.getcwd()), "session": call["start_new_session"]}
        # What a launcher starts may be one.
        request["launcher"] = getattr(self, "launcher", True)
        self.pid = _ask(_server(imported), request, files)
        self._child_created = True
        self._close_pipe_fds(*pipes)


def run(command: list[str], *, timeout: float = 120, **settings: Any) -> "subprocess.CompletedProcess[str]":
    """A command run to its end, with what it wrote; `settings` are those of `Popen`."""
    with Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _may_be_forked_from(environment: Mapping[str, str]) -> str | None:
    """The process, one of `IMPORTED`, that one with this environment may be forked from; None if there is none."""
    # A process that has looked for GPUs cannot have children that use them, and macOS has no fork without dangers.
    if not sys.platform.startswith("linux") or os.path.exists("/dev/nvidiactl"):
        return None
    differing = {name for name, value in environment.items() if _environment.get(name) != value}
    differing |= _environment.keys() - environment.keys()
    early = {name for name in differing if name.startswith(READ_BY_HUB + READ_BY_OTHERS)} - {*READ_LATER}
    if any(name.startswith(READ_BY_OTHERS) for name in early):
        return None
    return next((each for each in _available if each == "others" or not early), None)


@functools.cache
def _server(imported: str) -> socket.socket:
    """The way to the process from which others are forked; it ends when this one does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {name: value for name, value in _environment.items() if name != "PYTHONPATH"}
    # transformers complains at import; and one thread, for a process with several must not be forked.
    command = [sys.executable, __file__, imported]
    subprocess.Popen(command, env=environment | {"OMP_NUM_THREADS": "1"}, stdin=theirs, stderr=subprocess.DEVNULL)
    theirs.close()
    return ours


def _ask(server: socket.socket, request: Mapping[str, Any], files: list[int]) -> int:
    """The number of a new process, which is a child of this one."""
    with _adopting():
        socket.send_fds(server, [json.dumps(request).encode()], files)
        answer = server.recv(64)
    assert answer, "the process from which others are forked has ended"
    return int(answer)


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Within it, this process becomes the parent of descendants that have lost theirs."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _serve(requests: socket.socket) -> list[str]:
    """Fork a process for each request; returns in each of them, with the words of its command after `python`."""
    while True:
        message, files, _, _ = socket.recv_fds(requests, LARGEST_REQUEST, 3)
        if not message:
            sys.exit()
        request = json.loads(message)
        pid = _fork_orphan()
        if not pid:
            requests.close()
            return _begin(request, files)
        for file in files:
            os.close(file)
        requests.send(str(pid).encode())


def _begin(request: Mapping[str, Any], files: list[int]) -> list[str]:
    """Make this new process what was asked for, and return the words of its command."""
    if request["launcher"]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if not os.fork():
            ours.close()
            for file in files:
                os.close(file)
            return _serve(theirs)
        theirs.close()
        _fork_all_from(ours)
    _become(request, files)
    return request["words"]


def _fork_all_from(server: socket.socket) -> None:
    """Have what this process starts forked from the one at the other end, whoever starts it here."""
    global _server
    _server = lambda imported: server  # noqa: E731 - it takes the place of a function
    subprocess.Popen._execute_child = Popen._execute_child


def _fork_orphan() -> int:
    """Fork a process that has lost its parent when this returns the process's number; returns 0 in it."""
    ours, theirs = os.pipe()
    between = os.fork()
    if not between:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            os.write(theirs, str(pid).encode())
            os._exit(0)
        while os.getppid() == parent:
            time.sleep(0.001)
    else:
        os.waitpid(between, 0)
        pid = int(os.read(ours, 64))
    os.close(ours)
    os.close(theirs)
    return pid


def _become(request: Mapping[str, Any], files: list[int]) -> None:
    if request["session"]:
        os.setsid()
    for standard, file in enumerate(files):
        os.dup2(file, standard)
    for file in files:
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:0] = [folder for folder in request["environment"].get("PYTHONPATH", "").split(os.pathsep) if folder]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _execute(words: list[str]) -> None:
    """Run as `python` with these words would."""
    what, *arguments = words
    if what == "-u":
        sys.stdout.reconfigure(write_through=True)
        what, *arguments = words = arguments
    if what == "-m":
        sys.argv = arguments
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if what == "-c":
        code = compile(arguments[0], "<string>", "exec")
        sys.argv = ["-c", *arguments[1:]]
        sys.path.insert(0, "")
    else:
        code = compile(Path(what).read_bytes(), what, "exec")
        sys.argv = words
        sys.path.insert(0, str(Path(what).resolve().parent))
        main.__file__ = what
    exec(code, main.__dict__)


if __name__ == "__main__":
    # Ctrl-C at the terminal is for the tests, and this process ends with them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    del sys.path[0]
    _available = (sys.argv[1],)
    for library in IMPORTED[sys.argv[1]]:
        importlib.import_module(library)
    gc.freeze()
    _execute(_serve(socket.socket(fileno=os.dup(0))))
