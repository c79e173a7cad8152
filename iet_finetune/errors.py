"""The one error that reaches the user as a single line, and what makes others fit to."""

import errno
from collections.abc import Iterator

_DISK_FULL = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "disk quota exceeded"}


class UserError(Exception):
    """Something the user can mend: a flag, a file, a value.

    The message is one line that names the culprit and says what to do; the command prints it and exits with code 2.

    Attributes:
        speaker: which of several ranks says it. None: not settled, as in a run of one; True: this one; False: another
            one has said it, and this one ends in silence.
    """

    speaker: bool | None = None


def one_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text, for quoting a library's error inside our own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def disk_full(error: BaseException) -> str | None:
    """What says that a disk is full, and for which file if that is known; None if `error` has another cause."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
            # Of two names, as after a copy or a rename, the second is the one that was to be written.
            name = cause.filename2 or cause.filename
            return _DISK_FULL[cause.errno] + (f" for {name!r}" if name else "")
        if "No space left on device" in str(cause):
            # safetensors and torch pass the system's error on as text, in exceptions of their own.
            return f"{_DISK_FULL[errno.ENOSPC]} ({one_line(cause)})"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
