"""The words of `docs/results.md`, with the numbers that they speak of."""

from collections.abc import Sequence

import pandas as pd

from .arms import ARMS, COURSES, SHARDS
from .measurements import COUNTED, QUALITY, QUARTER, STOPPED, TITLES, WORDS, Measurements
from .sets import EXACT, LONG, LONG_TAIL, NEAR, ONCES, SETS, UNIQUES
from .tables import (
    at_same_quality,
    by_round,
    direction,
    equal_steps,
    half_way,
    interval,
    matched_once,
    number,
    part,
    percent,
    table,
    tell_tales,
    worth,
)

HEAD = f"""# Does it hold?

The paper's experiments at a small scale, and what its parts are worth compared with training for less time and with
removing duplicates. `make bench-memorization` writes this page from
[measurements.parquet](../benchmarks/memorization/measurements.parquet), which it also makes.
[benchmarks/README.md](../benchmarks/README.md) says how the data are split and how to run a part of it.

Keep the scale in mind: images are 16 to 64 pixels wide and networks have a million parameters; the paper's are ten to
a thousand times as large. A set has {ONCES} images once and {2 * sum(LONG_TAIL.values())} others
{min(LONG_TAIL)} to {max(LONG_TAIL)} times. Half of those are exact copies; the rest are shifted, scaled, mirrored,
re-encoded or of another brightness, and the search behind `--dedup near` finds most of them. Intervals are 95 %, over
images and seeds; with one seed they cover the images alone, and with three they are somewhat too narrow.

* **MQ 0.3** is the paper's measure: an image counts if its squared distance to the nearest training image is less than
  0.3 times the mean over its 50 nearest. Among a hundred images of two kinds, real ones do that too, so compare
  with held-out images.
* **f_mem** counts images that are three times nearer to one training image than to the next, **near copies** those
  that are twice as near, which hardly any real image is. An image is *extracted* if a near copy of it was drawn.
* **nearest to a repeat**: drawn images whose nearest training image is a repeated one. Held-out images show how often
  that happens by chance.
* **AUC** and **TPR** belong to a membership attack by the loss. **seconds** are processor time for training alone.
  They come from two kinds of processors, which benchmarks/README.md tells apart, and so say little.
* **agreement with new captions**: how often an image drawn of a held-out caption is nearer, in features, to the image
  that the caption belongs to than to another held-out one. Chance is 0.5.
* All arms of a set take the same number of steps in all; with IET each of {SHARDS} clones takes 1/{SHARDS} of them. So
  they make the same number of passes over the data, except the de-duplicated ones, whose data are smaller.
"""

EXTRACTED = "Originals of which a near copy was drawn, by how often they are in the data:\n"

AGAINST_STOPPING = """Compared with plain training *stopped at the same quality*: for each seed, the best {quality}
that both reach. The shares are those in excess of held-out images', followed by how much lower they are than plain
training's: 100 % where nothing is in excess, and – where plain training has no excess:
"""

ONCE_ONLY = """{images} images of the two classes that the base has never seen, each in the data once: nothing can be
left out. Some {passes:.0f} passes. Beside plain training *stopped at the same quality*, counting all that was drawn,
not only what exceeds held-out images:
"""

MUCH_LONGER = """Plain training of this set is best, by its held-out loss, after round {best} of those that were
judged. Are images memorized after all if training goes on from there? De-duplicated data are visited more often in the
same number of steps. One arm may train for as long, but ends by itself, and is judged as it is saved. After this many
rounds of 40 steps:
"""

LOOKS_AT = """## What AGC looks at

AGC skips samples whose loss is far below the bank's, which is the usual loss at their noise level. The table shows how
well losses tell images that are in the data five times or more from those that are there once, about halfway through
plain training (AUC; 0.5 is chance). The reference is the model that fine-tuning started from or, when training from
scratch, the run itself at the first round that was judged:
"""

BY_LEVEL = """By noise level, as a fraction of the schedule: eight draws at low noise, then five over the whole of it.
"""

SKIPPED = """What AGC skipped, over the whole run:
"""


def opening(measured: Measurements, there: Sequence[str]) -> str:
    """The paper's headline, as found here."""
    lines = [
        "## The headline\n",
        "The paper reports far less memorization at the same quality, after the same number of passes. Found here:\n",
    ]
    for name in (name for name in there if "iet-agc" in measured.arms(name)):
        seeds, quality = measured.shared_seeds(name, "iet-agc"), QUALITY[name]
        plain, ours, early = (measured.end(name, arm, seeds) for arm in ("plain", "iet-agc", QUARTER))
        lines.append(
            f"* *{TITLES[name]}*. By MQ 0.3: {direction(part(measured, name, 'iet-agc', 'mq_0.3'))}. Near copies: "
            f"{ours['close'].sum():.0f} instead of {plain['close'].sum():.0f}; repeated images extracted: "
            f"{ours['extracted_close'].sum():.0f} instead of {plain['extracted_close'].sum():.0f} of "
            f"{plain['repeated'].sum():.0f}. {WORDS[quality]}: {number(ours[quality].mean())} instead of "
            f"{number(plain[quality].mean())}. Plain training for only as many steps as a clone takes: near copies "
            f"{early['close'].sum():.0f}, {WORDS[quality]} {number(early[quality].mean())}."
        )
    lines.append("\nEach part by itself; near copies after the same number of steps:\n")
    lines += _by_arm(measured, there, ("agc", "chance", "iet", "iet-agc"))
    lines.append("\nBeyond the paper ([memorize-less.md](memorize-less.md)), the same:\n")
    beyond = ("search", "guard", "search-guard", "guard-pull", "search-guard-pull", "guard-levels", "guard-clones")
    lines += _by_arm(measured, there, (*beyond, "calibrated", "search-calibrated"))
    lines.append("\n![Copies over quality, every set](results/summary.png)\n")
    return "\n".join(lines)


def _by_arm(measured: Measurements, there: Sequence[str], arms: Sequence[str]) -> list[str]:
    """How many fewer near copies each arm has than plain training, a line an arm."""
    lines = []
    for arm in arms:
        found = [
            f"{TITLES[name]}: {direction(part(measured, name, arm, 'close'))}"
            for name in there
            if arm in measured.arms(name)
        ]
        if found:
            lines.append(f"* **{ARMS[arm].words}**. {'; '.join(found)}")
    return lines


def what_it_is_worth(measured: Measurements, there: Sequence[str]) -> str:
    """Against early stopping and de-duplication, from the tables, and what could not be shown."""
    lines = ["## What it is worth\n"]
    lines += ["Compared with plain training stopped at the same quality, how many fewer images, beyond chance, are"]
    for column in (f"nearest_{EXACT}", f"nearest_{NEAR}"):
        lines += [f"\n{COUNTED[column]} (a negative number is more):\n", table(worth(measured, there, column))]
    lines += [_ceiling(measured, there)]
    lines += ["Plain training stopped where its held-out loss is lowest, compared with the end of the same run:\n"]
    for name in there:
        stopped, end = measured.end(name, STOPPED), measured.end(name, "plain")
        share = (stopped["round"].to_numpy() / end["round"].to_numpy()).mean()
        lines.append(
            f"* *{TITLES[name]}*: after {100 * share:.0f} % of the passes; near copies {percent(_close(stopped))}, at "
            f"the end {percent(_close(end))}."
        )
    most = max(_close(measured.end(name, "plain")) for name in there)
    sees, eight = (
        [half_way(measured, name)[column].mean() for name in there]
        for column in ("told_by_bank_all", "told_by_reference_eight")
    )
    told = tell_tales(measured, there)
    if told:
        lines += [
            "\nHow well columns of `ledger.parquet` identify images that are in the data five times or more (AUC):\n"
        ]
        lines.append(table(told))
    lines += [
        "\nWhat AGC sees of a sample tells repeated images from others with an AUC of "
        f"{min(sees):.2f} to {max(sees):.2f}; eight draws at low noise, divided by a reference's, do so with an AUC "
        f"of {min(eight):.2f} to {max(eight):.2f}.",
        "\n## What could not be shown\n",
        "* The paper's own sets and sizes: `make paper SET=cifar10` prints what that would take; it has not been run.",
        "* Whether the order would change if every clone of IET were trained until it is as good as plain training.",
        f"* What happens beyond {percent(most)} of near copies: training ends before the models repeat everything.",
    ]
    missing = [
        f"{TITLES[name]} ({'plain training alone' if name in measured.sets() else 'nothing'} so far)"
        for name in SETS
        if name not in measured.sets() or measured.arms(name) == ["plain"]
    ]
    if missing:
        lines.append(f"* What has not been measured yet: {'; '.join(missing)}.")
    return "\n".join(lines) + "\n"


def _ceiling(measured: Measurements, there: Sequence[str]) -> str:
    """How much of what lands next to near repeats can be taken away at all."""
    column = f"nearest_{NEAR}"
    found = {
        name: at_same_quality(measured, name, "oracle", column) for name in there if "oracle" in measured.arms(name)
    }
    told = [
        f"{TITLES[name]}: {interval(each[2])}" for name, each in found.items() if each is not None and each[1].low > 0
    ]
    if not told:
        return ""
    return (
        "The oracle leaves every copy out, so that each image is there once. It still draws images next to those that "
        "were repeated: not copies of them, but what is near to one of many variants. Of the near repeats' excess a "
        f"rule can hardly be expected to take away more than the oracle does. {'; '.join(told)}.\n"
    )


def once_only(measured: Measurements, name: str) -> str:
    """Of a set whose images are in the data once."""
    seeds, course = measured.seeds(name, "plain"), COURSES[name]
    samples = course.round_steps * course.judged[-1] * course.flags["train_batch_size"]
    return "\n".join(
        [
            f"## {TITLES[name]}\n",
            f"![Quality and memorization of every arm](results/{name}.png)\n",
            f"After as many steps; {len(seeds)} seed{'s' if len(seeds) > 1 else ''}.\n",
            table(equal_steps(measured, name)),
            ONCE_ONLY.format(images=UNIQUES[name], passes=samples / UNIQUES[name]),
            table(matched_once(measured, name)),
        ]
    )


def much_longer(measured: Measurements) -> str:
    """Of training for several times as long as it takes to be best."""
    plain = measured.end(LONG, STOPPED)
    best = " or ".join(str(each) for each in sorted(plain["round"].unique().tolist()))
    return "\n".join([f"## {TITLES[LONG]}\n", MUCH_LONGER.format(best=best), table(by_round(measured, LONG))])


def _close(ends: pd.DataFrame) -> float:
    return float(ends["close"].sum() / ends["images"].sum())
