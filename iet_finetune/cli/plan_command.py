"""The command `plan`, and `--dry_run`: says what a run would do, need and take, and trains nothing that is kept."""

import os

from ..config.config import Config
from ..config.folders import check_folders
from ..errors import show, warn
from .parsing import PROGRAM


def plan_command(argv: list[str]) -> None:
    """Runs `iet-finetune plan` with the flags of `train`.

    Raises:
        UserError: whatever the user can mend.
    """
    config = Config.from_command_line(argv, f"{PROGRAM} plan")
    check_folders(config)
    show_plan(config)


def show_plan(config: Config) -> None:
    """Prints the plan of a run, and warns of what does not fit; of several ranks the first one does.

    Raises:
        UserError: whatever the user can mend.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    from ..planning import words
    from ..planning.plan import NumRanks, make_plan

    show("looking at the images, and trying a few steps ...")
    plan = make_plan(config, NumRanks.launched())
    show("\n".join(words.lines(config, plan)))
    for line in words.doubts(plan):
        warn(line)
