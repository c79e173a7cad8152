"""The one error that reaches the user as a single line."""


class UserError(Exception):
    """Something the user can mend: a flag, a file, a value.

    The message is one line that names the culprit and says what to do; the command prints it and exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text, for quoting a library's error inside our own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
