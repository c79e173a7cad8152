"""`make bench-memorization`: runs all that is missing, two at a time, and writes down what was found."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .arms import ARMS, arms_of
from .measurements import restore
from .one import BEFORE, measured_file
from .results import write_results
from .sets import FEW, LONG, SETS, UNIQUE
from .sources import ROOT

# Seeds of the sets whose differences are to be believed; the others have one.
SEEDS = {"garments": 3, "garments-new": 3, "text-to-image": 3, UNIQUE: 2, FEW: 2, LONG: 2}
# Those whose differences are small.
_CLOSE = (BEFORE, "plain", "search", "guard", "search-guard", "guard-pull", "search-guard-pull")
MORE_SEEDS = {("garments-new", arm): 5 for arm in _CLOSE}
Run = tuple[str, str, int]


def planned() -> list[Run]:
    """Every run: the first seed of all sets, then the second, and so on."""
    return [
        (name, arm, seed)
        for seed in range(max(*SEEDS.values(), *MORE_SEEDS.values()))
        for name in SETS
        for arm in (BEFORE, *arms_of(name))
        if seed < MORE_SEEDS.get((name, arm), SEEDS.get(name, 1))
    ]


def wanted(only: Sequence[str], seeds: int | None) -> list[Run]:
    """The runs that `--only SET` or `--only SET/ARM`, and `--seeds`, choose.

    Raises:
        SystemExit: there is no such set or arm.
    """
    for each in only:
        name, _, arm = each.partition("/")
        if name not in SETS or (arm and arm not in (BEFORE, *ARMS)):
            sys.exit(f"--only {each}: choose from {', '.join(SETS)}, alone or with /{', /'.join((BEFORE, *ARMS))}")
    chosen = [run for run in planned() if not only or run[0] in only or f"{run[0]}/{run[1]}" in only]
    return [run for run in chosen if seeds is None or run[2] < seeds]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memorization", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="sets, or SET/ARM")
    parser.add_argument("--seeds", type=int, help="how many seeds at most")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--home", type=Path, default=ROOT / "outputs" / "memorization", help="where all is kept")
    parser.add_argument("--report", action="store_true", help="only write the report of what has been measured")
    parser.add_argument("--go_on", action="store_true", help="take over the runs that measurements.parquet has")
    args = parser.parse_args()
    if args.go_on:
        restore(args.home)
    runs = wanted(args.only, args.seeds)
    if not args.report:
        try:
            _run_all(runs, args.home, args.jobs)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on with the runs that are not done", file=sys.stderr)
            sys.exit(130)
    write_results(args.home)


def _run_all(runs: Sequence[Run], home: Path, jobs: int) -> None:
    """Runs what has not been run; a run that fails stops those that have not begun."""
    home.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if not measured_file(home, *run).is_file()]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs have been done; results are in {home}", flush=True)
    going: dict[Run, tuple[subprocess.Popen, float]] = {}
    failed = False
    while (missing and not failed) or going:
        for run in list(_ready(missing, going, home)) if not failed else []:
            if len(going) < jobs:
                missing.remove(run)
                going[run] = _start(run, home), time.monotonic()
        time.sleep(1)
        for run, (process, since) in list(going.items()):
            if process.poll() is not None:
                del going[run]
                failed |= process.returncode != 0
                words = "done" if process.returncode == 0 else f"failed: see {_log(run, home)}"
                print(f"{' '.join(map(str, run))}: {words} in {time.monotonic() - since:.0f} s", flush=True)
    if failed:
        sys.exit(1)


def _ready(missing: Sequence[Run], going: dict[Run, tuple[subprocess.Popen, float]], home: Path) -> Iterator[Run]:
    """Those that wait for no other run: what is made once is made by one process, and chance follows AGC's rate."""
    open_runs = {*missing, *going}
    for name, arm, seed in missing:
        # If the first one is not among them, the others make it themselves.
        if arm != BEFORE and (name, BEFORE, 0) in open_runs:
            continue
        if arm == "chance" and not measured_file(home, name, "agc", seed).is_file():
            if (name, "agc", seed) not in open_runs:
                sys.exit(f"{name}/chance needs {name}/agc: name both.")
            continue
        yield name, arm, seed


def _log(run: Run, home: Path) -> Path:
    return home / "logs" / f"{run[0]}.{run[1]}.{run[2]}.log"


def _start(run: Run, home: Path) -> subprocess.Popen:
    log = _log(run, home)
    log.parent.mkdir(parents=True, exist_ok=True)
    name, arm, seed = run
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.memorization.one", name, arm, str(seed), str(home)]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    main()
