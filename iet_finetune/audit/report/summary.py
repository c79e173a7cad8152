"""An audit in the terminal: the verdict, the figures, and where the rest is."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .catalogue import describe, in_order
from .verdict import verdict

WIDTH = 100


def as_text(audit: Mapping[str, Any], folder: Path) -> str:
    """What the content of an audit.json says, at most 100 columns wide, and the paths of the files in its folder."""
    words = verdict(audit)
    lines = [*textwrap.wrap(words.headline, WIDTH), ""]
    for sentence in words.sentences:
        lines += textwrap.wrap(sentence.text, WIDTH, initial_indent="- ", subsequent_indent="  ")
    lines += ["", *_table(audit)]
    if missing := audit["not_measured"]:
        lines += ["", *textwrap.wrap(f"Not measured: {', '.join(in_order(missing))}.", WIDTH, subsequent_indent="  ")]
    for warning in audit["warnings"]:
        lines += textwrap.wrap(f"Warning: {warning}", WIDTH, subsequent_indent="  ")
    return "\n".join([*lines, "", f"figures: {folder / 'audit.json'}", f"report: {folder / 'report.html'}"])


def _table(audit: Mapping[str, Any]) -> list[str]:
    rows = [("", "value", "95 % interval", "null")]
    for name in in_order(audit["metrics"]):
        entry, figure = describe(name), audit["metrics"][name]
        if not entry.minor:
            interval = f"{entry.number(figure['low'])} to {entry.number(figure['high'])}"
            null = "-" if figure["null"] is None else entry.show(figure["null"])
            rows.append((entry.title, entry.show(figure["value"]), interval, null))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows
    ]
