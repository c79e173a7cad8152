"""The parser of a subcommand's arguments."""

import argparse
from typing import Any, NoReturn

from ..errors import UserError

PROGRAM = "iet-finetune"


class CommandParser(argparse.ArgumentParser):
    """A parser of `iet-finetune COMMAND` whose errors are a `UserError` each; `settings` are those of argparse's."""

    def __init__(self, command: str, **settings: Any) -> None:
        super().__init__(prog=f"{PROGRAM} {command}", allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises it."""
        raise UserError(f"{message} (`{self.prog} --help` lists the flags).")
