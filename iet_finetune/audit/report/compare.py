"""Two or more audits side by side: their figures, how far they lie apart, and whether they may be compared at all."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ...errors import UserError, one_line
from ...files import written_beside
from .catalogue import BY_REPEATS, in_order, repeats_name
from .comparable import differing_conditions
from .comparison import Comparison, Row
from .differences import difference
from .report import comparison_page

FORMAT, VERSION = "iet_finetune.audit", 1


def compare(files: Sequence[Path]) -> Comparison:
    """Reads audits and puts them side by side; each is compared with the first.

    Args:
        files: audit.json files, or folders that hold one, themselves or in `audit/`.

    Raises:
        UserError: there are fewer than two, one cannot be read, or no metric is in two of them.
    """
    if len(files) < 2:
        raise UserError("`--compare` needs at least two audits: give the audit.json of each.")
    found = [_file(Path(file)) for file in files]
    audits = [read_audit(file) for file in found]
    labels = _labels(found, audits)
    rows = _rows([_figures(audit) for audit in audits])
    if not rows:
        raise UserError(f"`--compare`: no metric was measured in two of {', '.join(map(str, files))}: audit again.")
    return Comparison(labels, tuple(audits), rows, tuple(differing_conditions(labels, audits)))


def read_audit(file: Path) -> dict[str, Any]:
    """The content of an audit.json.

    Raises:
        UserError: it is not there, damaged, something else, or of a later version.
    """
    try:
        audit = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else one_line(error)
        raise UserError(f"`--compare {file}`: {reason}: give the audit.json of an audit.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"`--compare {file}` is damaged ({one_line(error)}): audit again.") from None
    if not isinstance(audit, dict) or audit.get("format") != FORMAT:
        raise UserError(f"`--compare {file}` is not an audit of iet_finetune: give the audit.json of one.")
    if audit.get("version") != VERSION:
        raise UserError(
            f"`--compare {file}` is of version {audit.get('version')!r}, and this program reads version {VERSION}: "
            "update it, or audit again."
        )
    if fault := _fault(audit):
        raise UserError(f"`--compare {file}` is damaged ({fault}): audit again.")
    return audit


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of an audit")


def _file(path: Path) -> Path:
    inside = [path / "audit.json", path / "audit" / "audit.json"]
    return next((file for file in inside if file.is_file()), inside[0]) if path.is_dir() else path


def _fault(audit: Mapping[str, Any]) -> str | None:
    """What is wrong with the parts that a comparison reads; None if nothing is."""
    kinds = {"metrics": dict, "data": dict, "settings": dict, "versions": dict, "features": list, "by_repeats": list}
    for name, kind in kinds.items():
        if not isinstance(audit.get(name, kind()), kind):
            return f"its `{name}` is no {'table' if kind is dict else 'list'}"
    for name in ("features", "by_repeats"):
        if not all(isinstance(row, dict) for row in audit.get(name, [])):
            return f"its `{name}` holds something else than tables"
    return next(
        (f"`{name}` has no finite figures" for name, each in _figures(audit).items() if not _whole(each)), None
    )


def _whole(figure: Any) -> bool:
    if not isinstance(figure, dict):
        return False
    numbers = [figure.get(name) for name in ("value", "low", "high")]
    return all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers)


def _figures(audit: Mapping[str, Any]) -> dict[str, Any]:
    """All metrics of an audit by name, those of the images that are so often in the data among them."""
    figures = dict(audit.get("metrics", {}))
    for row in audit.get("by_repeats", []):
        for metric in BY_REPEATS:
            name = repeats_name(metric, str(row.get("repeats")))
            if name is not None and row.get(metric) is not None:
                figures.setdefault(name, row[metric])
    return figures


def _rows(figures: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    counts = Counter(name for each in figures for name in each)
    return tuple(_row(name, [each.get(name) for each in figures]) for name in in_order(counts) if counts[name] > 1)


def _row(name: str, figures: Sequence[Mapping[str, Any] | None]) -> Row:
    first = figures[0]
    others = [None if first is None or each is None else difference(first, each) for each in figures[1:]]
    return Row(name, tuple(figures), (None, *others))


def _labels(files: Sequence[Path], audits: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The models' names if they differ, else those of the folders, else a number behind them."""
    models = [str(audit.get("model") or _folder(file)) for file, audit in zip(files, audits, strict=True)]
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
