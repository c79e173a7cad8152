"""What was measured, as one table, and questions to it."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from .arms import ARMS, COURSES, FINE_TUNED, SHARDS, arms_of, is_latent
from .matched import Trajectory
from .one import BEFORE, measured_file, write_rows
from .sets import EXACT, FEW, LONG, NEAR, SETS, UNIQUE
from .sources import ROOT

TABLE = ROOT / "benchmarks" / "memorization" / "measurements.parquet"

TITLES = {
    "garments": "Garments, from scratch",
    "garments-class": "Garments by class, from scratch",
    "emoji": "Emoji, from scratch",
    "garments-new": "Garments of unseen classes, fine-tuning",
    "text-to-image": "Emoji from text in another style, fine-tuning",
    UNIQUE: "Garments of unseen classes, each once",
    FEW: "Garments of unseen classes, sixty of them",
    LONG: "Emoji from text in another style, much longer",
}
# What quality is measured by; lower is better.
QUALITY = {name: "heldout_loss" if is_latent(name) else "frechet" for name in SETS}
WORDS = {"frechet": "Fréchet distance", "heldout_loss": "log of the held-out loss"}
# What is counted among drawn images: column, and words.
COUNTED = {
    "mq_0.3": "MQ 0.3",
    "f_mem": "f_mem",
    "close": "near copies",
    f"nearest_{EXACT}": "nearest to an exact repeat",
    f"nearest_{NEAR}": "nearest to a near repeat",
}
# Plain training, but stopped earlier; read off its course, and no runs of their own.
QUARTER, STOPPED = "quarter", "stopped"


class Measurements:
    """All rows, and questions to them."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows

    def seeds(self, name: str, arm: str) -> list[int]:
        """The seeds that an arm of a set was run with."""
        rows = self.rows
        return sorted(rows[(rows["set"] == name) & (rows["arm"] == arm)]["seed"].unique().tolist())

    def shared_seeds(self, name: str, arm: str) -> list[int]:
        """Those that plain training was run with too."""
        return sorted({*self.seeds(name, _trained(arm))} & {*self.seeds(name, "plain")})

    def sets(self) -> list[str]:
        """The sets that can be told of: plain training was run, and `before` for each of its seeds."""
        return [
            name
            for name in SETS
            if self.seeds(name, "plain") and {*self.seeds(name, "plain")} <= {*self.seeds(name, BEFORE)}
        ]

    def arms(self, name: str) -> list[str]:
        """The arms of a set that were run with a seed that plain training was run with."""
        return [arm for arm in ARMS if arm in arms_of(name) and self.shared_seeds(name, arm)]

    def run(self, name: str, arm: str, seed: int) -> pd.DataFrame:
        """One run, by round."""
        rows = self.rows
        here = (rows["set"] == name) & (rows["arm"] == arm) & (rows["seed"] == seed)
        return rows[here].sort_values("round")

    def end(self, name: str, arm: str, seeds: Iterable[int] | None = None) -> pd.DataFrame:
        """The row of each seed's run that it ends with, or of plain training where it is stopped."""
        ends = []
        for seed in self.seeds(name, _trained(arm)) if seeds is None else seeds:
            run = self.run(name, _trained(arm), seed)
            if arm == QUARTER:
                run = run[run["round"] == COURSES[name].judged[-1] // SHARDS]
            elif arm == STOPPED:
                run = run[run["heldout_loss"] == run["heldout_loss"].min()]
            ends.append(run.tail(1))
        return pd.concat(ends)

    def baseline(self, name: str, column: str) -> float:
        """The share among held-out images, mean over the seeds."""
        rows = self.rows[(self.rows["set"] == name) & (self.rows["arm"] == BEFORE)]
        return float((rows[f"baseline_{column}"] / rows["baseline_images"]).mean())

    def trajectories(self, name: str, arm: str, column: str, seeds: Iterable[int]) -> list[Trajectory]:
        """Runs as courses through quality and a counted share; fine-tuning begins with the model it starts from."""
        runs = [self.run(name, arm, seed) for seed in seeds]
        if name in FINE_TUNED:
            starts = [self.run(name, BEFORE, seed) for seed in seeds]
            runs = [pd.concat(both) for both in zip(starts, runs, strict=True)]
        return [
            Trajectory(run[QUALITY[name]].to_numpy(float), run[column].to_numpy(int), run["images"].to_numpy(int))
            for run in runs
        ]


def _trained(arm: str) -> str:
    return "plain" if arm in (QUARTER, STOPPED) else arm


def words_of(arm: str) -> str:
    """What an arm is called in tables."""
    stopped = {
        QUARTER: f"plain, 1/{SHARDS} of the steps, as many as a clone of IET takes",
        STOPPED: "plain, stopped where the held-out loss is lowest",
    }
    return stopped.get(arm) or ARMS[arm].words


def collect(home: Path) -> pd.DataFrame:
    """All measurements in `home`, as one table; those of runs that were judged at other rounds are left out."""
    rows: list[dict[str, Any]] = []
    for file in sorted((home / "measured").glob("*.json")):
        run = json.loads(file.read_text())
        name, arm = run[0]["set"], run[0]["arm"]
        of_rounds = arm != BEFORE and not ARMS[arm].as_saved
        if not of_rounds or tuple(row["round"] for row in run) == COURSES[name].judged:
            rows += run
        else:
            print(f"{file} is of another course and is left out: remove it to run it again", file=sys.stderr)
    return pd.DataFrame(rows).sort_values(["set", "arm", "seed", "round"], ignore_index=True)


def restore(home: Path) -> None:
    """Takes over the runs that the table in the repository has, as if they had been measured here."""
    if not TABLE.is_file():
        sys.exit(f"{TABLE} is not there yet: leave out --go_on.")
    for (name, arm, seed), rows in pd.read_parquet(TABLE).groupby(["set", "arm", "seed"]):
        if not (file := measured_file(home, name, arm, seed)).is_file():
            write_rows(file, [row.dropna().to_dict() for _, row in rows.iterrows()])
