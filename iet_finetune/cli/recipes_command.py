"""The command `recipes`: lists the recipes, one line each."""

import argparse
from pathlib import Path

from ..config.recipes import headline, recipes


def recipes_command(argv: list[str]) -> str:
    """What `iet-finetune recipes` prints: each recipe as `--config` takes it, and its first line, which describes it.

    Raises:
        SystemExit: `--help`, or an argument, which the command does not take.
    """
    argparse.ArgumentParser("iet-finetune recipes", description="List the recipes for `--config`.").parse_args(argv)
    lines = {_shown(file): headline(file) for file in recipes()}
    width = max(map(len, lines), default=0)
    return "\n".join(f"{name:<{width}}  {line}" for name, line in lines.items())


def _shown(file: Path) -> str:
    """The path of a recipe below this folder, the name of another."""
    here = Path.cwd()
    return str(file.relative_to(here)) if file.is_relative_to(here) else file.stem
