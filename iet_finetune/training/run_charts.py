"""The numbers and curves of `run.html`, from the lines of `metrics.jsonl`."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..pages.plot import bar_chart, line_chart
from .callbacks import RunFacts
from .run_words import in_words

Part = dict[str, Any]


def tiles(lines: Sequence[Part], facts: RunFacts, seconds: float | None) -> list[tuple[str, str]]:
    """Title and value of the numbers that matter most."""
    shown = [("Rounds done", f"{facts.round} of {facts.total_rounds}")]
    if lines:
        shown.append(("Training loss", f"{lines[-1]['loss']:.4f}"))
        looks = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
        shown += [("Held-out loss, logarithm", f"{looks[-1]:.3f}")] if looks else []
        shown.append(("Skipped in the last round", f"{lines[-1]['skip_rate']:.1%}"))
    if seconds is not None:
        shown.append(("Time left", in_words(seconds)))
    return shown[:4] if seconds is None else [*shown[:-1][:3], shown[-1]]


def charts(lines: Sequence[Part]) -> Iterator[Part]:
    """The curves by round."""
    if not lines:
        return
    rounds = [line["round"] for line in lines]
    several = len(lines[0]["shard_loss"]) > 1
    losses = _by_shard(lines, "shard_loss") if several else []
    words = "Mean over the samples of a round." + (" Thin: each shard's clone." if several else "")
    yield _curve("Training loss", rounds, "all clones", [line["loss"] for line in lines], words, losses)
    if any("heldout_loss" in line for line in lines):
        words = (
            "Mean logarithm of the loss of the weights that would be saved, with the same noise after each round. "
            "Once it rises, the model learns nothing more that holds for new images."
        )
        yield _curve("Held-out loss", rounds, "held-out images", [line.get("heldout_loss") for line in lines], words)
    words = "Percent of a round's samples that gave no gradient."
    yield _curve("Skipped samples", rounds, "all clones", [100 * line["skip_rate"] for line in lines], words)
    yield _skipped_by_level(lines[-1]["skip_rate_by_noise_level"])
    drifts = _by_shard(lines, "clone_drift") if several else []
    words = "Length of a round's change over the length of the weights."
    words += " Thin: each clone's before they are merged." if several else ""
    yield _curve("How far the weights move", rounds, "merged", [line["merge_drift"] for line in lines], words, drifts)
    yield _curve("Learning rate", rounds, "first clone", [line["lr"][0] for line in lines], "At the end of a round.")


def _short(value: float) -> str:
    """Three digits, in so few characters that they fit beside an axis: `0.105`, `1.05e-4`."""
    if not 0 < abs(value) < 1e-3:
        return f"{value:.3g}"
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{digits}e{int(exponent)}"


def _by_shard(lines: Sequence[Part], name: str) -> list[tuple[float | None, ...]]:
    return list(zip(*(line[name] for line in lines), strict=True))


def _skipped_by_level(rates: Sequence[float | None]) -> Part:
    title, edges = "Skipped by noise level", [place / len(rates) for place in range(len(rates) + 1)]
    return {
        "title": title,
        "axis": "noise level (share of the schedule)",
        "words": "Percent of the last round's samples, from little noise to much.",
        "series": ["last round"],
        "svg": bar_chart(title, edges, [100 * (rate or 0.0) for rate in rates]),
    }


def _curve(
    title: str,
    rounds: Sequence[int],
    name: str,
    values: Sequence[float | None],
    words: str,
    faint: Sequence[Sequence[float | None]] = (),
) -> Part:
    drawn = line_chart(title, rounds, [(name, values)], _short, faint)
    return {"title": title, "axis": "round", "words": words, "series": [name], "svg": drawn}
