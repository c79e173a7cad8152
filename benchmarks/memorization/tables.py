"""The tables of `docs/results.md`."""

import math
from collections.abc import Iterator, Sequence

import pandas as pd

from .arms import ARMS, COURSES
from .matched import Interval, difference, fewer
from .measurements import COUNTED, QUALITY, QUARTER, STOPPED, TITLES, WORDS, Measurements, words_of
from .sets import LONG_TAIL, ONCES, UNIQUES

Row = dict[str, str]


def counted(name: str) -> dict[str, str]:
    """What is counted in a set, by column; a set without repeats has none to be near to."""
    return {column: words for column, words in COUNTED.items() if name not in UNIQUES or "nearest" not in column}


def _shares(runs: pd.DataFrame, name: str) -> Row:
    """What was counted in runs of a set, by words."""
    return {words: percent(runs[column].sum() / runs["images"].sum()) for column, words in counted(name).items()}


def equal_steps(measured: Measurements, name: str) -> list[Row]:
    """All arms after as many steps: what was counted, and quality; plain training stopped earlier beside them."""
    arms = measured.arms(name)
    rows = []
    for arm in (arms[0], QUARTER, STOPPED, *arms[1:]):
        last = measured.end(name, arm)
        row = {"": words_of(arm)}
        row |= _shares(last, name)
        if name in UNIQUES:
            row["images extracted"] = f"{last['extracted_close_x1'].sum():.0f} of {UNIQUES[name] * len(last)}"
        else:
            row["repeated images extracted"] = f"{last['extracted_close'].sum():.0f} of {last['repeated'].sum():.0f}"
        row[WORDS[QUALITY[name]]] = spread(last[QUALITY[name]])
        row["recall"] = percent(last["recall"].mean())
        if "caption_agreement" in last and last["caption_agreement"].notna().all():
            row["agreement with new captions"] = f"{last['caption_agreement'].mean():.2f}"
        row["AUC"] = f"{last['mia_auc'].mean():.2f}"
        row["TPR at 1 %"] = percent(last["mia_tpr"].mean())
        row["seconds"] = f"{last['seconds'].mean():.0f}"
        rows.append(row)
    base = {"": "*held-out images*"} | {
        words: percent(measured.baseline(name, each)) for each, words in counted(name).items()
    }
    return [*rows, base]


def fewer_than_plain(measured: Measurements, name: str) -> list[Row]:
    """By which part each arm has fewer copies than plain training after as many steps, with intervals."""
    return [
        {"": words_of(arm)}
        | {COUNTED[column]: interval(part(measured, name, arm, column)) for column in ("mq_0.3", "close", "f_mem")}
        for arm in (QUARTER, STOPPED, *measured.arms(name))
        if arm != "plain"
    ]


def part(measured: Measurements, name: str, arm: str, column: str) -> Interval:
    """By which part an arm ends with fewer of something than plain training; nothing is taken off for a baseline."""
    seeds = measured.shared_seeds(name, arm)
    ends = [measured.end(name, each, seeds)[[column, "images"]].to_numpy(int) for each in (arm, "plain")]
    return fewer(*(list(map(tuple, rows)) for rows in ends))


def extracted(measured: Measurements, name: str) -> list[Row]:
    """How many of the originals were extracted, by how often they are in the data, exact and near copies together."""
    rows = []
    for arm in measured.arms(name):
        last = measured.end(name, arm)
        counts = {1: len(last) * ONCES, **{t: 2 * n * len(last) for t, n in LONG_TAIL.items()}}
        row = {"": words_of(arm)}
        for times, count in counts.items():
            heading = "once" if times == 1 else f"{times} times"
            row[heading] = f"{last[f'extracted_close_x{times}'].sum():.0f} of {count}"
        rows.append(row)
    return rows


def matched(measured: Measurements, name: str) -> list[Row]:
    """Each arm beside plain training stopped at the same quality."""
    rows = []
    for arm in (arm for arm in measured.arms(name) if arm != "plain"):
        row = {"": words_of(arm), "at quality": spread(pd.Series(_shared_quality(measured, name, arm)))}
        # Of MQ 0.3 the baseline is higher than what most models come to.
        for column, words in COUNTED.items():
            if column != "mq_0.3":
                row[words] = compared(at_same_quality(measured, name, arm, column))
        rows.append(row)
    return rows


def matched_once(measured: Measurements, name: str) -> list[Row]:
    """The same of a set without repeats, of all that is counted and not only of what is beyond chance."""
    return [
        {"": words_of(arm), "at quality": spread(pd.Series(_shared_quality(measured, name, arm)))}
        | {
            words: compared(at_same_quality(measured, name, arm, column, 0.0))
            for column, words in counted(name).items()
        }
        for arm in measured.arms(name)
        if arm != "plain"
    ]


def by_round(measured: Measurements, name: str) -> list[Row]:
    """What was counted at each judged round, an arm after the other."""
    rows = []
    for arm in measured.arms(name):
        runs = pd.concat([measured.run(name, arm, seed) for seed in measured.shared_seeds(name, arm)])
        for rounds, each in _at_rounds(runs, ARMS[arm].as_saved):
            row = {"": words_of(arm), "round": rounds}
            row |= _shares(each, name)
            row["repeated images extracted"] = f"{each['extracted_close'].sum():.0f} of {each['repeated'].sum():.0f}"
            row[WORDS[QUALITY[name]]] = spread(each[QUALITY[name]])
            rows.append(row)
    return rows


def _at_rounds(runs: pd.DataFrame, as_saved: bool) -> Iterator[tuple[str, pd.DataFrame]]:
    """Rounds in words, with their rows; of runs that ended by themselves, one for all, with the round each kept."""
    if as_saved:
        told = dict.fromkeys(f"{row['round']:.0f} (ended at {row['ended']:.0f})" for _, row in runs.iterrows())
        yield ", ".join(told), runs
    else:
        yield from ((str(number), each) for number, each in runs.groupby("round"))


def worth(measured: Measurements, there: Sequence[str], column: str) -> list[Row]:
    """By which part a count is lower than plain training's at the same quality, of every arm and set."""
    rows = []
    for arm in (arm for arm in ARMS if arm != "plain" and any(arm in measured.arms(name) for name in there)):
        row = {"": words_of(arm)}
        for name in there:
            found = at_same_quality(measured, name, arm, column) if arm in measured.arms(name) else None
            row[TITLES[name]] = interval(found[2]) if found is not None and found[1].low > 0 else "–"
        rows.append(row)
    return rows


LEDGER = {"ledger_loss": "loss", "ledger_guard": "guard's score", "ledger_copies": "copies found"}


def tell_tales(measured: Measurements, there: Sequence[str]) -> list[Row]:
    """How well the ledger's columns name repeated images, of the runs whose ledger was looked at."""
    rows = []
    for name in there:
        for arm in measured.arms(name):
            end = measured.end(name, arm)
            found = {words: end[column].mean() for column, words in LEDGER.items() if column in end}
            if not all(math.isnan(value) for value in found.values()):
                shown = {words: "–" if math.isnan(value) else f"{value:.2f}" for words, value in found.items()}
                rows.append({"": f"{TITLES[name]}, {words_of(arm)}", **shown})
    return rows


def _shared_quality(measured: Measurements, name: str, arm: str) -> list[float]:
    """The best quality that an arm's run and plain training's come to, of each seed that both have."""
    seeds = measured.shared_seeds(name, arm)
    both = [measured.trajectories(name, each, "mq_0.3", seeds) for each in (arm, "plain")]
    return [max(one.best, other.best) for one, other in zip(*both, strict=True)]


def at_same_quality(
    measured: Measurements, name: str, arm: str, column: str, baseline: float | None = None
) -> tuple[Interval, Interval, Interval] | None:
    """What `difference` gives of an arm and plain training, with each seed at the best quality that both come to.

    Held-out images are the baseline if none is given.
    """
    seeds, wanted = measured.shared_seeds(name, arm), _shared_quality(measured, name, arm)
    ours, theirs = (measured.trajectories(name, each, column, seeds) for each in (arm, "plain"))
    return difference(ours, theirs, wanted, measured.baseline(name, column) if baseline is None else baseline)


def signals(measured: Measurements, there: Sequence[str]) -> list[Row]:
    """What tells repeated images from others, half way through plain training."""
    rows = []
    for name in there:
        last = half_way(measured, name)
        row = {"": TITLES[name]}
        for column, words in SIGNALS.items():
            row[words] = f"{last[column].mean():.2f}"
        rows.append(row)
    return rows


SIGNALS = {
    "told_by_loss_all": "loss, any noise level",
    "told_by_bank_all": "loss divided by the bank's",
    "told_by_reference_all": "loss divided by a reference's, any noise level",
    "told_by_reference_eight": "the same, eight draws at low noise",
}


def half_way(measured: Measurements, name: str) -> pd.DataFrame:
    """The rows of plain training that are nearest to half of its rounds, of each seed."""
    judged = COURSES[name].judged
    round_ = min(judged, key=lambda each: abs(each - judged[-1] / 2))
    rows = measured.rows
    return rows[(rows["set"] == name) & (rows["arm"] == "plain") & (rows["round"] == round_)]


def signals_by_level(measured: Measurements, name: str) -> list[Row]:
    """The same by noise level, as a part of the schedule: of the membership attack's draws, then of the loss's."""
    last = half_way(measured, name)
    levels = last["levels"].iloc[0]
    rows = []
    for column, words in (("told_by_loss", "loss"), ("told_by_reference", "loss divided by a reference's")):
        means = pd.DataFrame(last[column].tolist()).mean()
        cells = {f"{100 * level:.1f} %": f"{mean:.2f}" for level, mean in zip(levels, means, strict=True)}
        rows.append({"": f"{TITLES[name]}, {words}", **cells})
    return rows


def skips(measured: Measurements, there: Sequence[str]) -> list[Row]:
    """What AGC skipped over the whole run."""
    groups = {
        "once": "of images in the data once",
        "often": "of images in the data five times or more",
        "all": "of all",
    }
    return [
        {"": f"{TITLES[name]}, {words_of(arm)}"}
        | {words: percent(measured.end(name, arm)[f"skipped_{each}"].mean()) for each, words in groups.items()}
        for name in there
        for arm in ("agc", "iet-agc")
        if measured.seeds(name, arm)
    ]


def percent(share: float) -> str:
    """0.0234 as `2.3 %`."""
    text = f"{100 * share:.1f}"
    return ("0.0" if text == "-0.0" else text) + " %"


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}"


def spread(values: pd.Series) -> str:
    """The mean, and between which values the seeds lie: `21.4 (20.8 to 22.0)`."""
    if len(values) == 1:
        return number(values.iloc[0])
    return f"{number(values.mean())} ({number(values.min())} to {number(values.max())})"


def interval(found: Interval) -> str:
    """A part with its interval, as percentages: `52 % (31 to 66)`; – where there was nothing to lose."""
    if math.isnan(found.value):
        return "–"
    return f"{100 * found.value:.0f} % ({100 * found.low:.0f} to {100 * found.high:.0f})"


def direction(found: Interval) -> str:
    """The same in words: fewer, more, or neither clearly."""
    if math.isnan(found.value):
        return "none in either"
    if found.low > 0:
        return f"{interval(found)} fewer"
    if found.high < 0:
        return f"{interval(Interval(-found.value, -found.high, -found.low))} more"
    return f"no clear difference ({100 * found.low:.0f} to {100 * found.high:.0f} % fewer)"


def compared(found: tuple[Interval, Interval, Interval] | None) -> str:
    """Two shares in excess of the baseline, and by how much ours is lower if theirs is clearly above it."""
    if found is None:
        return "–"
    ours, theirs, lower = found
    shares = f"{percent(ours.value)}, plain {percent(theirs.value)}"
    return f"{shares}: {direction(lower)}" if theirs.low > 0 else shares


def table(rows: Sequence[Row]) -> str:
    """A table in Markdown; nothing without rows."""
    if not rows:
        return ""
    heads = list(rows[0])
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *([row.get(head, "") for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
