"""The console command `iet-finetune`: its subcommands, and how a run ends for the person at the terminal."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ..config.config import Config
from ..config.flags import nearest
from ..config.folders import check_folders
from ..errors import UserError, disk_full, out_of_memory, show
from .parsing import PROGRAM
from .ranks import split_off, start_ranks

# Seconds for which a rank that has nothing to say waits for the one that has: launchers end all when one has ended. It
# is longer where the ranks could not settle yet which of them that is.
PATIENCE, LONG_PATIENCE = 2, 10
# What transformers says by logger that is not for the people here: torchvision is needed by nothing, and captions that
# are too long are told of, and cut off, before the model sees them.
_NOT_FOR_PEOPLE = {
    "transformers.utils.import_utils": "requires torchvision",
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",
}
HOW_TO_GO_ON = "`--resume_from_checkpoint latest` goes on from the last checkpoint, if there is one"


class Command(NamedTuple):
    """One subcommand: its line in `--help`, what it does with its arguments, and what helps after Ctrl-C."""

    help: str
    function: Callable[[list[str]], None]
    after_interrupt: str


def train(argv: list[str], prog: str | None = None) -> None:
    """Train as the flags in `argv` say; they are checked before torch is imported. `prog` is the name in `--help`.

    So are the folders that they name.

    Raises:
        UserError: whatever the user can mend.
    """
    ranks, argv = split_off(argv)
    config = Config.from_command_line(argv, prog)
    check_folders(config)
    if ranks is not None and ranks > 1 and not config.training.dry_run:
        sys.exit(start_ranks(ranks, ["iet_finetune", "train", *argv]))
    if config.training.dry_run:
        from .plan_command import show_plan

        show_plan(config)
        return
    from ..training.interrupts import says_how_to_go_on

    with says_how_to_go_on(config):
        from ..training.trainer import Trainer

        Trainer(config).train()


def plan(argv: list[str]) -> None:
    """Print what the run would do, need and take that the flags in `argv` describe.

    Raises:
        UserError: whatever the user can mend.
    """
    from .plan_command import plan_command

    plan_command(argv)


def fit(argv: list[str]) -> None:
    """Fine-tune on the images that the arguments name with settings chosen for them, and audit the result.

    Raises:
        UserError: whatever the user can mend.
    """
    from .fit_command import fit_command

    fit_command(argv)


def push(argv: list[str]) -> None:
    """Upload the finished pipeline that the arguments name, and print where it is now.

    Raises:
        UserError: whatever the user can mend.
    """
    from .push_command import push_command

    show(push_command(argv))


def merge(argv: list[str]) -> None:
    """Merge the adapters or models that the arguments name, and print what the result is and what loads it.

    Raises:
        UserError: whatever the user can mend.
    """
    from .merge_command import merge_command

    show(merge_command(argv))


def convert(argv: list[str]) -> None:
    """Write the LoRA file that the arguments name under other names, and print where it is.

    Raises:
        UserError: whatever the user can mend.
    """
    from .convert_command import convert_command

    show(convert_command(argv))


def audit(argv: list[str]) -> None:
    """Audit the pipeline that the arguments name, or compare audits, and print what was found.

    Raises:
        UserError: whatever the user can mend.
    """
    from .audit_command import audit_command

    show(audit_command(argv))


def data(argv: list[str]) -> None:
    """Look at the images that the arguments name, and print what was found.

    Raises:
        UserError: whatever the user can mend.
    """
    from .data_command import data_command

    show(data_command(argv))


def doctor(argv: list[str]) -> None:
    """Check this machine, and print what was found.

    Raises:
        UserError: whatever the user can mend, or a check failed.
    """
    from .doctor_command import doctor_command

    show(doctor_command(argv, show))


def recipes(argv: list[str]) -> None:
    """Print the recipes that `--config` can be given.

    Raises:
        UserError: whatever the user can mend.
    """
    from .recipes_command import recipes_command

    show(recipes_command(argv))


COMMANDS = {
    "fit": Command("fine-tune on your own images, with settings chosen for them, and audit", fit, HOW_TO_GO_ON),
    "train": Command(
        "fine-tune a pipeline on a set of images; takes the flags of train_iet_agc.py",
        lambda argv: train(argv, f"{PROGRAM} train"),
        HOW_TO_GO_ON,
    ),
    "plan": Command(
        "say what a run would do, how much memory, disk and time it takes; takes the flags of train",
        plan,
        "the same command starts over",
    ),
    "data": Command(
        "look at a set of images before training: faults, copies, captions, crops",
        data,
        "the same command starts over",
    ),
    "audit": Command(
        "measure how much a pipeline repeats its training images, and how good its images are",
        audit,
        "the same command goes on where it was",
    ),
    "doctor": Command("check whether this machine is fit for training", doctor, "the same command starts over"),
    "recipes": Command("list the recipes for --config, one line each", recipes, "the same command starts over"),
    "push": Command("upload a finished pipeline with its model card to the Hub", push, "the same command starts over"),
    "merge": Command(
        "merge LoRA files, pipelines or denoisers trained elsewhere", merge, "the same command starts over"
    ),
    "convert": Command(
        "write a LoRA file under the names that other tools match", convert, "the same command starts over"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand in `argv` (default: the command line) and return the exit code, as `run` gives it.

    `--help` ends with `SystemExit(0)`, as argparse does.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is None:
        return run(lambda: _without_command(arguments))
    return run(lambda: command.function(arguments[1:]), command.after_interrupt)


def _without_command(arguments: list[str]) -> None:
    first = arguments[0] if arguments else None
    if first in ("-h", "--help"):
        show(_usage())
    elif first == "--version":
        from .. import __version__

        print(f"{PROGRAM} {__version__}")
    elif first is None or first.startswith("-"):
        raise UserError(
            f"a command comes first, as in `{PROGRAM} train --config FILE`; `{PROGRAM} --help` lists them."
        )
    else:
        raise UserError(f"unknown command `{first}`.{nearest(first, COMMANDS)} `{PROGRAM} --help` lists them.")


def _usage() -> str:
    lines = [f"  {name:<10}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Fine-tune diffusers pipelines with IET-AGC, so that they do not repeat their training images.",
            "",
            "commands:",
            *lines,
            "",
            f"`{PROGRAM} COMMAND --help` shows the flags of a command, `{PROGRAM} --version` prints the version.",
        ]
    )


def run(function: Callable[[], None], after_interrupt: str = HOW_TO_GO_ON) -> int:
    """Call `function` and return the exit code: 0, 2 after an error of the user, 130 after Ctrl-C or SIGTERM.

    An error that the user can mend (`UserError`, a full disk, a device out of memory), Ctrl-C and SIGTERM end in one
    line on stderr. Any other exception is a bug of ours and keeps its traceback. Of several ranks one says it. After
    an interrupt it says `after_interrupt`, or what the `KeyboardInterrupt` itself knows better.
    """
    for name in _NOT_FOR_PEOPLE:
        logging.getLogger(name).addFilter(_is_for_people)
    try:
        with _interrupted_by_sigterm():
            function()
    except UserError as error:
        code = _stop(f"error: {error}", 2, _speaks(error))
        if error.printed_here is not None:
            # With ranks that may be dead, the collective library might wait for them when Python ends.
            sys.stdout.flush()
            os._exit(code)
        return code
    except KeyboardInterrupt as interrupt:
        helps = interrupt.args[0] if interrupt.args else after_interrupt
        return _stop(f"interrupted; {helps}.", 130, os.environ.get("RANK", "0") == "0")
    except Exception as error:
        if (full := disk_full(error)) is not None:
            return _stop(f"error: {full}; free some and try again ({after_interrupt}).", 2)
        if (full := out_of_memory(error)) is not None:
            return _stop(f"error: {full}; lower batch size or resolution, or free the device ({after_interrupt}).", 2)
        raise
    return 0


def _is_for_people(record: logging.LogRecord) -> bool:
    """False for what `_NOT_FOR_PEOPLE` names."""
    return _NOT_FOR_PEOPLE[record.name] not in record.getMessage()


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM, with which `kill` and cluster managers ask a process to end, is taken as Ctrl-C inside."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _speaks(error: UserError) -> bool:
    """Whether it is this rank that tells of an error; if not, returns when the one that does has had time for it."""
    if error.printed_here or (error.printed_here is None and os.environ.get("LOCAL_RANK", "0") == "0"):
        return True
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(LONG_PATIENCE if error.printed_here is None else PATIENCE)
    # Still here: then an error that is not settled between the ranks was one of this rank alone.
    return error.printed_here is None


def _stop(message: str, exit_code: int, speaks: bool = True) -> int:
    if speaks:
        # A file name may hold a line break; the promise is one line.
        print(f"{PROGRAM}: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    return exit_code
