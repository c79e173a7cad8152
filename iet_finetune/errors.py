"""What reaches the user: the error in a single line, helpers that put other errors into one line, and results."""

import errno
import os
import signal
import sys
from collections.abc import Iterator

_DISK_FULL = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "disk quota exceeded"}


class UserError(Exception):
    """An error that the user can fix: a wrong flag, file or value.

    The message is one line that names the cause and says what to do. The command prints it and exits with code 2.

    Attributes:
        printed_here: whether this rank prints the error. None: not decided, as in a run on one rank. False: another
            rank has printed it, and this one exits silently.
    """

    printed_here: bool | None = None


def warn(text: str) -> None:
    """Prints one line of warning."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Prints a result. Where nobody reads on, as after `| head`, the command ends silently, as others do."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would try once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def one_line(error: BaseException) -> str:
    """Returns the first non-empty line of an exception's text, to quote a library's error in one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def out_of_memory(error: BaseException) -> str | None:
    """Returns what a device that ran out of memory had to give and did not have; None for any other error."""
    # By its name: this is read where torch may not be imported.
    if type(error).__name__ != "OutOfMemoryError":
        return None
    # "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...", and then its allocator.
    return ". ".join(one_line(error).split(". ")[:2]).rstrip(".")


def disk_full(error: BaseException) -> str | None:
    """Returns the reason and, if known, the file when `error` was caused by a full disk; None otherwise."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
            # After a copy or a rename there are two names; the second is the one being written.
            name = cause.filename2 or cause.filename
            return _DISK_FULL[cause.errno] + (f" for {name!r}" if name else "")
        if "No space left on device" in str(cause):
            # safetensors and torch raise their own exceptions with the system's error as text.
            return f"{_DISK_FULL[errno.ENOSPC]} ({one_line(cause)})"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
