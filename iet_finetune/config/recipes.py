"""YAML files of flags: the user's own, and the recipes in `configs/`, which are installed with the package."""

from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from .flags import nearest
from .places import expanded
from .unknown import unknown

_PACKAGE = Path(__file__).parents[1]
# Beside the package in a clone of the repository, in it where a wheel was installed.
FOLDER = next((each for each in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if each.is_dir()), _PACKAGE)


def recipes() -> list[Path]:
    """The files of all recipes, by name."""
    return sorted(FOLDER.glob("*.yaml"))


def headline(file: Path) -> str:
    """The first line of a recipe, which is a comment."""
    return file.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()


def find_file(name: str) -> Path:
    """The file that `--config` names: a file, or else a recipe by its name, even where a folder has it.

    Raises:
        UserError: neither; the nearest recipe is named.
    """
    by_name = {file.stem: file for file in recipes()}
    place = Path(expanded(name, "`--config`"))
    if name in by_name and not place.is_file():
        return by_name[name]
    if place.exists():
        return place
    raise UserError(
        f"`--config {name}` cannot be read: there is no such file or recipe.{nearest(Path(name).stem, by_name)} "
        "`iet-finetune recipes` lists the recipes."
    )


def read_yaml(path: str, known: list[str]) -> dict[str, Any]:
    """The mapping in the YAML file that `--config` names.

    Args:
        path: of a file, or the name of a recipe where there is no such file.
        known: the keys that it may have.

    Raises:
        UserError: no such file, not YAML, not a mapping, a key that stands twice, or unknown keys, all of them with
            what was probably meant.
    """
    import yaml

    try:
        text = find_file(path).read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`--config {path}` cannot be read: {one_line(error)}.") from None
    except (yaml.YAMLError, ValueError) as error:
        # A date that does not exist, such as 2024-99-99, is a plain ValueError.
        raise UserError(f"`--config {path}` is not valid YAML: {' '.join(str(error).split())}.") from None
    if values is None or node is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"`--config {path}` must hold `key: value` lines, not a {type(values).__name__}.")
    if strange := [str(key) for key in values if key not in known]:
        raise unknown(strange, known, "key", f" in `--config {path}`")
    keys = [key.value for key, _ in node.value]
    for key in values:
        # YAML itself would take the last one without a word.
        if keys.count(key) > 1:
            raise UserError(f"`{key}` stands twice in `--config {path}`: leave one.")
    return values
