"""Names of folders that `datasets` takes for something else."""

import os
import re

from ..errors import UserError

# What it expands, or matches with the names of other folders, whose files it would read.
_PATTERN = re.compile(r"[*?\[\]$\n]")
# What it takes for a file inside an archive.
_CHAIN = "::"


def check_name(source: str, folder: str | None, *, patterns: bool) -> None:
    """Raises a `UserError` if `datasets` would look elsewhere than in a folder.

    Args:
        source: what errors call it, such as "`--dataset_name data/cats`".
        folder: None is always right.
        patterns: whether it also matches the name as a pattern.
    """
    path = os.path.abspath(folder or "")
    found = _CHAIN if _CHAIN in path else next(iter(_PATTERN.findall(path)), None) if patterns else None
    if folder is not None and found is not None:
        raise UserError(
            f"{source} cannot be read by `datasets`, to which {found!r} in `{path}` means something else: rename that "
            "folder."
        )
