"""The recipes in `configs/`, one line each."""

from pathlib import Path

FOLDER = Path(__file__).parents[2] / "configs"


def headline(file: Path) -> str:
    """The first line of a recipe, which is a comment."""
    return file.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
