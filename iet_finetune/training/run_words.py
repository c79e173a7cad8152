"""How a run goes, in words, from the lines of its `metrics.jsonl`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]
# Tenths of the noise schedule are little, middle or much noise.
_AMOUNTS = (("little", range(3)), ("a middle amount of", range(3, 7)), ("much", range(7, 10)))


def how_it_goes(lines: Sequence[Line], total_rounds: int, *, watches: bool, doubt: str | None) -> Iterator[str]:
    """Sentences on losses and skipping so far.

    Args:
        lines: one at least, in the order of the rounds.
        watches: whether held-out images are looked at.
        doubt: why the skip rule can hardly act, if that is so.
    """
    yield _about_training(lines)
    yield _about_heldout(lines, total_rounds, watches)
    yield _about_skipping(lines, doubt)


def _about_training(lines: Sequence[Line]) -> str:
    first, last = lines[0]["loss"], lines[-1]["loss"]
    if len(lines) == 1:
        return f"The training loss is {last:.4f}."
    change = (last - first) / abs(first) if first else 0.0
    way = "higher" if change > 0 else "lower"
    compared = "the same as" if abs(change) < 0.005 else f"{abs(change):.0%} {way} than"
    return f"The training loss is {last:.4f}, {compared} in the first round."


def _about_heldout(lines: Sequence[Line], total_rounds: int, watches: bool) -> str:
    looks = [(line["heldout_loss"], line["round"]) for line in lines if line.get("heldout_loss") is not None]
    if not looks:
        if watches:
            return "The held-out images have not been looked at yet."
        return (
            "Nothing tells when to stop: `--holdout_fraction 0.1 --stop_when auto` would watch images that are not "
            "trained on, and stop in time."
        )
    (_, best), latest = min(looks), looks[-1][1]
    if best == latest:
        more = " More rounds may help." if latest >= total_rounds else ""
        return (
            "The held-out loss is at its lowest: what the model learns also holds for images that it is not trained "
            f"on.{more}"
        )
    return (
        f"The held-out loss was lowest after round {best} and has been higher since: what the model has learned from "
        "then on holds for the training images alone, and it may be memorizing some of them."
    )


def _about_skipping(lines: Sequence[Line], doubt: str | None) -> str:
    if not any(line["skip_rate"] for line in lines):
        return f"Nothing has been skipped so far.{f' {doubt}' if doubt else ''}"
    rate, levels = lines[-1]["skip_rate"], lines[-1]["skip_rate_by_noise_level"]
    if not rate:
        return "Nothing was skipped in the last round."
    rates = {words: _mean([levels[place] for place in places]) for words, places in _AMOUNTS}
    most = max(rates, key=lambda words: rates[words])
    return f"{rate:.1%} of the samples of the last round were skipped, most of them with {most} noise."


def _mean(values: Sequence[float | None]) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else 0.0


def in_words(seconds: float) -> str:
    """A duration: `2 h 5 min`, `7 min`, `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
