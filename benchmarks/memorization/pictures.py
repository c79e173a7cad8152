"""Pictures of quality and memorization."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from .arms import ARMS, arms_of
from .measurements import COUNTED, QUALITY, TITLES, WORDS, Measurements
from .sets import NEAR, UNIQUES

# One colour an arm, the same in every picture (Okabe and Ito's, which the colour-blind can tell apart).
COLOURS = dict(
    zip(
        ARMS,
        ("#000000", "#E69F00", "#999999", "#56B4E9", "#D55E00", "#0072B2", "#CC79A7", "#009E73")
        # More that stand apart.
        + (
            "#882255",
            "#44AA99",
            "#8C6D1F",
            "#6A3D9A",
            "#B15928",
            "#F0E442",
            "#117733",
            "#AA4499",
            "#88CCEE",
            "#661100",
        ),
        strict=True,
    )
)


def draw_set(measured: Measurements, name: str, file: Path) -> None:
    """Copies and landing near repeats, both over quality: one curve an arm, seeds as bands."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), dpi=110, constrained_layout=True)
    for axis, column in zip(axes, ("mq_0.3", "close" if name in UNIQUES else f"nearest_{NEAR}"), strict=True):
        _curves(axis, measured, name, column)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    _save(figure, file)


def draw_summary(measured: Measurements, there: Sequence[str], file: Path) -> None:
    """One panel a set: copies over quality."""
    figure, axes = plt.subplots(1, len(there), figsize=(4 * len(there), 3.8), dpi=110, constrained_layout=True)
    for axis, name in zip(np.atleast_1d(axes), there, strict=True):
        _curves(axis, measured, name, "mq_0.3")
        axis.set_title(TITLES[name], fontsize=9)
    handles, labels = np.atleast_1d(axes)[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    _save(figure, file)


def _curves(axis: plt.Axes, measured: Measurements, name: str, column: str) -> None:
    for arm in arms_of(name):
        if not (seeds := measured.seeds(name, arm)):
            continue
        runs = [measured.run(name, arm, seed) for seed in seeds]
        quality = np.mean([run[QUALITY[name]] for run in runs], axis=0)
        shares = 100 * np.array([run[column] / run["images"] for run in runs])
        axis.plot(quality, shares.mean(axis=0), ".-", color=COLOURS[arm], label=ARMS[arm].words, linewidth=1.4)
        if len(runs) > 1:
            axis.fill_between(quality, shares.min(axis=0), shares.max(axis=0), color=COLOURS[arm], alpha=0.12, lw=0)
    baseline = 100 * measured.baseline(name, column)
    axis.axhline(baseline, color="#666666", linewidth=1, linestyle=":", label="held-out images")
    axis.set_xlabel(f"{WORDS[QUALITY[name]]} (better to the left)")
    axis.set_ylabel(f"{COUNTED[column]}, % of drawn images")
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: plt.Figure, file: Path) -> None:
    # Without the version of the library: the same numbers give the same file.
    figure.savefig(file, metadata={"Software": None})
    plt.close(figure)
