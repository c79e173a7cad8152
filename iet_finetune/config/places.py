"""Files and folders as people type them: `~` is a home folder, and what can be no path is refused."""

import os

from ..errors import UserError


def expanded(value: str, where: str) -> str:
    """`value` with `~` or `~user` at its beginning replaced by that home folder; otherwise as it was typed.

    Done here once, since the libraries below do it each in its own way, or not at all.

    Args:
        value: a file or folder, or a name of something else, which is left as it is.
        where: begins the error, such as "`--output_dir`".

    Raises:
        UserError: it is empty, names a user that does not exist, or holds characters that no path may hold.
    """
    if not value:
        raise UserError(f"{where} is empty: give a name, or leave it out.")
    if "\0" in value or not _is_text(value):
        raise UserError(f"{where} {value!a} is no name that can be written as text (UTF-8): use another one.")
    home = os.path.expanduser(value)
    if home.startswith("~"):
        user = value.partition("/")[0].removeprefix("~")
        raise UserError(
            f"{where} {value}: there is no user {user!r} here, whose home folder `~{user}` would be. Give the whole "
            "path."
        )
    return home


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it; bytes of a file name that are not UTF-8 reach Python as lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
