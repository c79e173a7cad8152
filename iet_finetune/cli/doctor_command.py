"""The command `doctor`: checks of this machine."""

from collections.abc import Callable
from pathlib import Path

from ..config.places import expanded
from ..errors import UserError, one_line
from .parsing import CommandParser


def doctor_command(argv: list[str], show: Callable[[str], None]) -> str:
    """Runs `iet-finetune doctor`; returns a last line.

    Args:
        show: is given each line of the table when a check is done.

    Raises:
        UserError: wrong arguments, or a check failed.
    """
    args = doctor_parser().parse_args(argv)
    if not args.gpu:
        if given := [name for name in ("only", "json") if getattr(args, name) is not None]:
            raise UserError(f"`--{given[0]}` goes with `--gpu`: give both.")
        from ..doctor.machine import about_machine

        for line in about_machine():
            show(line)
        return "`iet-finetune doctor --gpu` tries what runs and what fits."
    from ..doctor import leave_driver_asleep

    leave_driver_asleep()
    from ..doctor.checks import FAILED, HEAD, device, report, run_checks, shown
    from ..doctor.gpu import CHECKS

    names = {check.name: check for check in CHECKS}
    if unknown := set(args.only or ()) - set(names):
        raise UserError(f"`--only {' '.join(sorted(unknown))}`: the checks are {', '.join(names)}.")
    outcomes: list = []
    file = None if args.json is None else Path(expanded(args.json, "`--json`"))
    _write(file, report(outcomes))
    show(HEAD)
    for outcome in run_checks([names[name] for name in args.only or names]):
        outcomes.append(outcome)
        show(shown(outcome))
        _write(file, report(outcomes))
    failed = [outcome.name for outcome in outcomes if outcome.answer == FAILED]
    if failed:
        raise UserError(f"{len(failed)} of {len(outcomes)} checks failed: {', '.join(failed)}.")
    where = "" if device() == "cuda" else " There is no GPU that torch can use: what can run on the CPU has run there."
    return f"\n{len(outcomes)} checks, none failed.{where}"


def doctor_parser() -> CommandParser:
    """The parser of its arguments."""
    parser = CommandParser(
        "doctor",
        description="Look at this machine: versions, devices, the Hub, how runs are launched, what is missing for "
        "what. It needs neither data nor a network.",
    )
    parser.add_argument(
        "--gpu", action="store_true", help="try whether the GPU is used as it should be, and what fits on it"
    )
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="these checks alone; a wrong name lists them")
    parser.add_argument("--json", metavar="FILE", help="file for everything that was found")
    return parser


def _write(file: Path | None, text: str) -> None:
    if file is None:
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"`--json {file}` cannot be written: {error.strerror or one_line(error)}.") from None
