"""The command `recipes`: lists the recipes, one line each."""

import argparse
from pathlib import Path

from ..config.recipes import FOLDER, headline
from ..errors import UserError


def recipes_command(argv: list[str], folder: Path = FOLDER) -> str:
    """What `iet-finetune recipes` prints: each recipe's path and its first line, which says what it is.

    Raises:
        UserError: the recipes are not there, as when only the package was installed.
    """
    argparse.ArgumentParser("iet-finetune recipes", description="List the recipes for `--config`.").parse_args(argv)
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise UserError(f"there are no recipes in `{folder}`: they come with a clone of the repository.")
    names = [_shown(file) for file in files]
    width = max(len(name) for name in names)
    return "\n".join(f"{name:<{width}}  {headline(file)}" for name, file in zip(names, files, strict=True))


def _shown(file: Path) -> str:
    here = Path.cwd()
    return str(file.relative_to(here)) if file.is_relative_to(here) else str(file)
