"""Writes `docs/results.md` and its pictures from what was measured."""

import sys
from pathlib import Path

import pandas as pd

from . import tables
from .measurements import QUALITY, TABLE, TITLES, WORDS, Measurements, collect
from .prose import (
    AGAINST_STOPPING,
    BY_LEVEL,
    EXTRACTED,
    HEAD,
    LOOKS_AT,
    SKIPPED,
    much_longer,
    once_only,
    opening,
    what_it_is_worth,
)
from .sets import LONG, UNIQUES
from .sources import ROOT

DOCUMENT = ROOT / "docs" / "results.md"
PICTURES = ROOT / "docs" / "results"


def write_results(home: Path) -> None:
    """Writes the table, the pictures and the document; from the table alone where nothing was measured here."""
    if (home / "measured").is_dir():
        collect(home).to_parquet(TABLE, index=False)
    if not TABLE.is_file():
        sys.exit("nothing has been measured yet: leave out --report.")
    measured = Measurements(pd.read_parquet(TABLE))
    found = measured.sets()
    if not (there := [name for name in found if name not in (*UNIQUES, LONG)]):
        sys.exit("no set has both `plain` and `before` yet: leave out --report, or name both with --only.")
    alone = [name for name in found if name in UNIQUES]
    PICTURES.mkdir(parents=True, exist_ok=True)
    from .pictures import draw_set, draw_summary

    for name in (*there, *alone):
        draw_set(measured, name, PICTURES / f"{name}.png")
    draw_summary(measured, there, PICTURES / "summary.png")
    parts = [
        HEAD,
        opening(measured, there),
        *(section(measured, name) for name in there),
        *(once_only(measured, name) for name in alone),
        *([much_longer(measured)] if LONG in found else []),
        LOOKS_AT,
        tables.table(tables.signals(measured, there)),
        BY_LEVEL,
        *(tables.table(tables.signals_by_level(measured, name)) for name in there),
        SKIPPED,
        tables.table(tables.skips(measured, there)),
        what_it_is_worth(measured, there),
    ]
    DOCUMENT.write_text("\n".join(parts), encoding="utf-8")


def section(measured: Measurements, name: str) -> str:
    """All about one set."""
    seeds = measured.seeds(name, "plain")
    return "\n".join(
        [
            f"## {TITLES[name]}\n",
            f"![Quality and memorization of every arm](results/{name}.png)\n",
            f"After the same number of steps; {len(seeds)} seed{'s' if len(seeds) > 1 else ''}.\n",
            tables.table(tables.equal_steps(measured, name)),
            "How many fewer than plain training's, after the same number of steps:\n",
            tables.table(tables.fewer_than_plain(measured, name)),
            EXTRACTED,
            tables.table(tables.extracted(measured, name)),
            AGAINST_STOPPING.format(quality=WORDS[QUALITY[name]]),
            tables.table(tables.matched(measured, name)),
        ]
    )
