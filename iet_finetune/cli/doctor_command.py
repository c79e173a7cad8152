"""The command `doctor`: checks of this machine."""

import argparse
from pathlib import Path
from typing import NoReturn

from ..errors import UserError


def doctor_command(argv: list[str]) -> str:
    """Runs `iet-finetune doctor --gpu` and prints each check when it is done; returns a last line.

    Raises:
        UserError: wrong arguments, or a check failed.
    """
    parser = _Parser(
        prog="iet-finetune doctor", description="Check this machine; needs neither data nor a network.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="whether the GPU is used as it should be, and what fits")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="these checks alone; a wrong name lists them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for everything that was found")
    args = parser.parse_args(argv)
    if not args.gpu:
        raise UserError("`doctor` needs to be told what to check: `--gpu`.")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UserError(f"`--json {args.json}`: there is no folder {args.json.parent}.")
    from ..doctor import leave_driver_asleep

    leave_driver_asleep()
    from ..doctor.checks import FAILED, HEAD, report, run_checks, shown
    from ..doctor.gpu import CHECKS

    names = {check.name: check for check in CHECKS}
    if unknown := set(args.only or ()) - set(names):
        raise UserError(f"`--only {' '.join(sorted(unknown))}`: the checks are {', '.join(names)}.")
    print(HEAD, flush=True)
    outcomes = []
    for outcome in run_checks([names[name] for name in args.only or names]):
        outcomes.append(outcome)
        print(shown(outcome), flush=True)
        if args.json is not None:
            args.json.write_text(report(outcomes), encoding="utf-8")
    failed = [outcome.name for outcome in outcomes if outcome.answer == FAILED]
    if failed:
        raise UserError(f"{len(failed)} of {len(outcomes)} checks failed: {', '.join(failed)}.")
    return f"\n{len(outcomes)} checks, none failed"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`iet-finetune doctor --help` lists the flags).")
