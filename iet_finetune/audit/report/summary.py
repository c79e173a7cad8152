"""An audit in the terminal: the verdict, the metrics, and where the files are."""

import textwrap
from pathlib import Path

from .catalogue import describe, in_order
from .record import AuditRecord
from .verdict import verdict

WIDTH = 100


def as_text(audit: AuditRecord, folder: Path) -> str:
    """The audit in at most 100 columns, and the paths of the files in its folder."""
    words = verdict(audit)
    lines = [*textwrap.wrap(words.headline, WIDTH), ""]
    for sentence in words.sentences:
        lines += textwrap.wrap(sentence.text, WIDTH, initial_indent="- ", subsequent_indent="  ")
    if words.advice:
        lines += ["", "What now:"]
    for text in words.advice:
        lines += textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ")
    lines += ["", *_table(audit)]
    lines += _not_measured(audit)
    for warning in audit.warnings:
        lines += textwrap.wrap(f"Warning: {warning}", WIDTH, subsequent_indent="  ")
    return "\n".join([*lines, "", f"metrics: {folder / 'audit.json'}", f"report: {folder / 'report.html'}"])


def main_rows(audit: AuditRecord) -> list[tuple[str, str, str, str]]:
    """Title, value, interval and baseline of each metric but the details; an empty text without a baseline."""
    rows = []
    for name in in_order(audit.metrics):
        entry, metric = describe(name), audit.metrics[name]
        if not entry.minor:
            baseline = "" if metric.baseline is None else entry.show(metric.baseline)
            rows.append((entry.title, entry.show(metric.value), entry.interval(metric.low, metric.high), baseline))
    return rows


def _not_measured(audit: AuditRecord) -> list[str]:
    """What was not measured, by the reasons why."""
    names: dict[str, list[str]] = {}
    for name in in_order(audit.not_measured):
        names.setdefault(audit.not_measured[name], []).append(name)
    texts = [f"Not measured: {', '.join(those)} ({reason.rstrip('.')})." for reason, those in names.items()]
    lines = [line for text in texts for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]
    return ["", *lines] if lines else []


def _table(audit: AuditRecord) -> list[str]:
    rows = [("", "value", "95 % interval", "baseline"), *((*row[:3], row[3] or "-") for row in main_rows(audit))]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows
    ]
