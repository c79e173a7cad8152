"""Two or more audits side by side: their metrics, the differences, and whether they may be compared at all."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import UserError
from ...files import written_beside
from ..measures.metrics import Metric
from .catalogue import BY_REPEATS, in_order, repeats_name
from .comparable import differing_conditions
from .comparison import Comparison, Row, difference
from .record import AuditRecord, read_audit
from .report import comparison_page


def compare(files: Sequence[Path]) -> Comparison:
    """Reads audits and compares each with the first.

    Args:
        files: audit.json files, or folders that hold one, themselves or in `audit/`.

    Raises:
        UserError: there are fewer than two, one cannot be read, or no metric is in two of them.
    """
    if len(files) < 2:
        raise UserError("`--compare` needs at least two audits: give the audit.json of each.")
    found = [_file(Path(file)) for file in files]
    audits = [read_audit(file, f"`--compare {file}`") for file in found]
    labels = _labels(found, audits)
    rows = _rows([_metrics(audit) for audit in audits])
    if not rows:
        raise UserError(f"`--compare`: no metric was measured in two of {', '.join(map(str, files))}: audit again.")
    return Comparison(labels, tuple(audits), rows, tuple(differing_conditions(labels, audits)))


def _file(path: Path) -> Path:
    inside = [path / "audit.json", path / "audit" / "audit.json"]
    return next((file for file in inside if file.is_file()), inside[0]) if path.is_dir() else path


def _metrics(audit: AuditRecord) -> dict[str, Metric]:
    """All metrics by name, with those of the images that are equally often in the data."""
    metrics = dict(audit.metrics)
    for row in audit.by_repeats:
        for whole, metric in row.metrics.items():
            if whole in BY_REPEATS and (name := repeats_name(whole, row.repeats)) is not None:
                metrics.setdefault(name, metric)
    return metrics


def _rows(metrics: Sequence[Mapping[str, Metric]]) -> tuple[Row, ...]:
    counts = Counter(name for each in metrics for name in each)
    return tuple(_row(name, [each.get(name) for each in metrics]) for name in in_order(counts) if counts[name] > 1)


def _row(name: str, values: Sequence[Metric | None]) -> Row:
    first = values[0]
    others = [None if first is None or each is None else difference(first, each) for each in values[1:]]
    return Row(name, tuple(values), (None, *others))


def _labels(files: Sequence[Path], audits: Sequence[AuditRecord]) -> tuple[str, ...]:
    """The models' names if they differ, else those of the folders, else a number behind them."""
    models = [audit.model or _folder(file) for file, audit in zip(files, audits, strict=True)]
    for names in (models, [_folder(file) for file in files]):
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{model} ({number})" for number, model in enumerate(models, 1))


def _folder(file: Path) -> str:
    """The folder that an audit belongs to; that of `runs/a/audit/audit.json` is `a`."""
    folder = file.absolute().parent
    return (folder.parent if folder.name == "audit" else folder).name


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Writes `compare.json` and `compare.html` into a folder, which is made, and returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "compare.html"
    with written_beside(folder / "compare.json") as partial:
        partial.write_text(json.dumps(comparison.to_json(), indent=1) + "\n", encoding="utf-8")
    with written_beside(page) as partial:
        partial.write_text(comparison_page(comparison), encoding="utf-8", errors="replace")
    return page
