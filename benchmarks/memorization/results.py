"""Writes `docs/results.md` and its pictures from what was measured."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .arms import ARMS, COURSES, arms_of
from .matched import Interval, Trajectory, difference, fewer
from .one import BEFORE, measured_file, write_rows
from .sets import EXACT, NEAR, SETS
from .sources import ROOT

TABLE = ROOT / "benchmarks" / "memorization" / "measurements.parquet"
DOCUMENT = ROOT / "docs" / "results.md"
PICTURES = ROOT / "docs" / "results"

TITLES = {
    "garments": "Garments, from scratch",
    "garments-class": "Garments by class, from scratch",
    "emoji": "Emoji, from scratch",
    "garments-new": "Garments of unseen classes, fine-tuning",
    "text-to-image": "Emoji from text in another style, fine-tuning",
}
# What quality is measured by; lower is better.
QUALITY = {name: "heldout_loss" if name == "text-to-image" else "frechet" for name in SETS}
WORDS = {"frechet": "Fréchet distance", "heldout_loss": "log of the held-out loss"}
# What is counted among drawn images: column, and words.
COUNTED = {
    "mq_0.3": "MQ 0.3",
    "f_mem": "f_mem",
    "close": "nearest at half the distance of the second",
    f"nearest_{EXACT}": "nearest to an exact repeat",
    f"nearest_{NEAR}": "nearest to a near repeat",
}


class Measurements:
    """All rows, and questions to them."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows

    def seeds(self, name: str, arm: str) -> list[int]:
        """The seeds that an arm of a set was run with."""
        rows = self.rows
        return sorted(rows[(rows["set"] == name) & (rows["arm"] == arm)]["seed"].unique().tolist())

    def run(self, name: str, arm: str, seed: int) -> pd.DataFrame:
        """One run, by round."""
        rows = self.rows
        here = (rows["set"] == name) & (rows["arm"] == arm) & (rows["seed"] == seed)
        return rows[here].sort_values("round")

    def baseline(self, name: str, column: str) -> float:
        """The share among held-out images, mean over the seeds."""
        rows = self.rows[(self.rows["set"] == name) & (self.rows["arm"] == BEFORE)]
        return float((rows[f"baseline_{column}"] / rows["baseline_images"]).mean())

    def trajectories(self, name: str, arm: str, column: str, seeds: Iterable[int]) -> list[Trajectory]:
        """Runs as courses through quality and a counted share."""
        runs = [self.run(name, arm, seed) for seed in seeds]
        return [
            Trajectory(run[QUALITY[name]].to_numpy(float), run[column].to_numpy(int), run["images"].to_numpy(int))
            for run in runs
        ]


def collect(home: Path) -> pd.DataFrame:
    """All measurements in `home`, as one table."""
    rows: list[dict[str, Any]] = []
    for file in sorted((home / "measured").glob("*.json")):
        rows += json.loads(file.read_text())
    return pd.DataFrame(rows).sort_values(["set", "arm", "seed", "round"], ignore_index=True)


def restore(home: Path) -> None:
    """Takes over the runs that the table in the repository has, as if they had been measured here."""
    if not TABLE.is_file():
        sys.exit(f"{TABLE} is not there yet: leave out --go_on.")
    for (name, arm, seed), rows in pd.read_parquet(TABLE).groupby(["set", "arm", "seed"]):
        if not (file := measured_file(home, name, arm, seed)).is_file():
            write_rows(file, [row.dropna().to_dict() for _, row in rows.iterrows()])


def write_results(home: Path) -> None:
    """Writes the table, the pictures and the document; from the table alone where nothing was measured here."""
    if (home / "measured").is_dir():
        collect(home).to_parquet(TABLE, index=False)
    if not TABLE.is_file():
        sys.exit("nothing has been measured yet: leave out --report.")
    measured = Measurements(pd.read_parquet(TABLE))
    there = [name for name in SETS if measured.seeds(name, "plain")]
    PICTURES.mkdir(parents=True, exist_ok=True)
    from .pictures import draw_set, draw_summary

    for name in there:
        draw_set(measured, name, PICTURES / f"{name}.png")
    draw_summary(measured, there, PICTURES / "summary.png")
    parts = [
        HEAD,
        *(part for name in there for part in _set(measured, name)),
        _signals(measured, there),
        _skips(measured, there),
    ]
    DOCUMENT.write_text("\n".join(parts), encoding="utf-8")


HEAD = ""


def _set(measured: Measurements, name: str) -> list[str]:
    """The section of one set."""
    seeds = measured.seeds(name, "plain")
    counts = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    return [
        f"## {TITLES[name]}\n",
        f"![Quality and memorization of every arm](results/{name}.png)\n",
        f"At equal passes, after the last round; {counts}.\n",
        table(_equal_passes(measured, name)),
        f"At matched quality ({WORDS[QUALITY[name]]}).\n",
        table(_matched(measured, name)),
    ]


def _equal_passes(measured: Measurements, name: str) -> list[dict[str, str]]:
    """All arms after as many steps: what was counted, with the reduction against plain training, and quality."""
    rows = []
    for arm in _arms(measured, name):
        last = _last(measured, name, arm)
        row = {"": ARMS[arm].words}
        for column, words in COUNTED.items():
            row[words] = percent(last[column].sum() / last["images"].sum())
            if column == "mq_0.3" and arm != "plain":
                row["fewer than plain"] = _fewer(measured, name, arm, column)
            elif column == "mq_0.3":
                row["fewer than plain"] = ""
        row["repeated images extracted"] = _extracted(measured, name, arm)
        row[WORDS[QUALITY[name]]] = number(last[QUALITY[name]].mean())
        row["recall"] = percent(last["recall"].mean())
        row["AUC"] = f"{last['mia_auc'].mean():.2f}"
        rows.append(row)
    base = {"": "*held-out images*"} | {
        words: percent(measured.baseline(name, each)) for each, words in COUNTED.items()
    }
    return [*rows, base]


def _arms(measured: Measurements, name: str) -> list[str]:
    return [arm for arm in ARMS if arm in arms_of(name) and measured.seeds(name, arm)]


def _last(measured: Measurements, name: str, arm: str) -> pd.DataFrame:
    """The last rows of each seed's run."""
    return pd.concat([measured.run(name, arm, seed).tail(1) for seed in measured.seeds(name, arm)])


def _fewer(measured: Measurements, name: str, arm: str, column: str) -> str:
    seeds = sorted({*measured.seeds(name, arm)} & {*measured.seeds(name, "plain")})
    pairs = [
        [tuple(measured.run(name, each, seed).tail(1)[[column, "images"]].to_numpy(int)[0]) for seed in seeds]
        for each in (arm, "plain")
    ]
    return interval(fewer(*pairs, baseline=measured.baseline(name, column)))


def _extracted(measured: Measurements, name: str, arm: str) -> str:
    """How many of the repeated originals were extracted at the last point, of how many."""
    rows = _last(measured, name, arm)
    return f"{rows['extracted_close'].sum():.0f} of {rows['repeated'].sum():.0f}"


def _matched(measured: Measurements, name: str) -> list[dict[str, str]]:
    """Each arm beside plain training stopped at the same quality."""
    rows = []
    for arm in _arms(measured, name):
        if arm == "plain":
            continue
        seeds = sorted({*measured.seeds(name, arm)} & {*measured.seeds(name, "plain")})
        both = [measured.trajectories(name, each, "mq_0.3", seeds) for each in (arm, "plain")]
        # The best quality that all these runs come to.
        wanted = max(run.best for runs in both for run in runs)
        row = {"": ARMS[arm].words, "at quality": number(wanted)}
        for column, words in COUNTED.items():
            ours, theirs = (measured.trajectories(name, each, column, seeds) for each in (arm, "plain"))
            found = difference(ours, theirs, wanted, measured.baseline(name, column))
            assert found is not None
            row[f"{words}, over its baseline"] = f"{percent(found[0].value)}, plain {percent(found[1].value)}"
            row[f"less ({words})"] = interval(found[2]) if found[1].low > 0 else "–"
        rows.append(row)
    return rows


def _signals(measured: Measurements, there: Sequence[str]) -> str:
    """What tells repeated images from others, in plain training."""
    rows = []
    for name in there:
        last = measured.rows[(measured.rows["set"] == name) & (measured.rows["arm"] == "plain")]
        last = last[last["round"] == COURSES[name].judged[len(COURSES[name].judged) // 2]]
        row = {"": TITLES[name]}
        for column, words in (
            ("told_by_loss_all", "loss, any noise level"),
            ("told_by_bank_all", "loss over the bank's"),
            ("told_by_reference_all", "loss over a reference's, any noise level"),
            ("told_by_reference_eight", "the same, eight draws at little noise"),
        ):
            row[words] = f"{last[column].mean():.2f}"
        rows.append(row)
    return table(rows)


def _skips(measured: Measurements, there: Sequence[str]) -> str:
    rows = []
    for name in there:
        for arm in (arm for arm in ("agc", "iet-agc") if measured.seeds(name, arm)):
            last = _last(measured, name, arm)
            rates = {
                words: percent(last[f"skipped_{each}"].mean())
                for each, words in (
                    ("once", "of images in the data once"),
                    ("often", "of images five times and more"),
                    ("all", "of all"),
                )
            }
            rows.append({"": f"{TITLES[name]}, {ARMS[arm].words}", **rates})
    return table(rows)


def percent(share: float) -> str:
    """0.0234 as `2.3 %`."""
    text = f"{100 * share:.1f}"
    return ("0.0" if text == "-0.0" else text) + " %"


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}"


def interval(found: Interval) -> str:
    """A part with its interval, as percentages: `52 % (31 to 66)`."""
    return f"{100 * found.value:.0f} % ({100 * found.low:.0f} to {100 * found.high:.0f})"


def table(rows: Sequence[dict[str, str]]) -> str:
    """A table in Markdown; nothing without rows."""
    if not rows:
        return ""
    heads = list(rows[0])
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *([row.get(head, "") for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
