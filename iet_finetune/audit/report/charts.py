"""Charts of the report: histograms, metrics by noise level, and intervals."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from ...pages.plot import Plot, svg
from ..measures.metrics import Metric


def histogram_chart(
    title: str,
    edges: Sequence[float],
    series: Sequence[tuple[str, Sequence[float]]],
    axis: str,
    threshold: tuple[float, str] | None = None,
    root: bool = False,
) -> Markup:
    """Shares by bin: the first series as filled bars, the others as outlines.

    Args:
        title: for screen readers, together with the median of each series.
        edges: (n + 1,) ascending, not all equal.
        series: name and n counts each; each is divided by its own total, as they may be of different sizes.
        axis: what is measured.
        threshold: a value to mark with a line, and its label.
        root: the height of a bar is the square root of its share, so that few of many can be seen.
    """
    shares = [(name, [value / (sum(counts) or 1) for value in counts]) for name, counts in series]
    top = _top(max((max(values, default=0.0) for _, values in shares), default=0.0), root)
    plot = Plot(edges[0], edges[-1], 0.0, math.sqrt(top) if root else top)
    if root:
        shares = [(name, [math.sqrt(value) for value in values]) for name, values in shares]
    drawn = [plot.frame(lambda height: f"{100 * (height**2 if root else height):.2g} %")]
    for number, (_, values) in enumerate(shares):
        drawn.append(plot.steps(edges, values, f"series-{number + 1}", filled=number == 0))
    if threshold is not None:
        drawn.append(plot.upright(*threshold))
    middles = ", ".join(f"{name}: median about {_median(edges, counts):.3g}" for name, counts in series)
    return svg(title, f"{axis}. {middles}.", drawn)


def level_chart(title: str, levels: Sequence[float], series: Sequence[tuple[str, Sequence[Metric | None]]]) -> Markup:
    """AUC by noise level: a point for each level, with its interval, and a line at 0.5.

    Args:
        title: as above.
        levels: (n,) shares of the schedule.
        series: name, and the metric of each level, None where there is none.
    """
    points = [point for _, values in series for point in values if point is not None]
    low = min([0.4, *(point.low for point in points)])
    high = max([0.7, *(point.high for point in points)])
    reach = (max(levels) - min(levels)) * 0.08 or 0.05
    plot = Plot(min(levels) - reach, max(levels) + reach, max(0.0, low - 0.02), min(1.0, high + 0.02))
    drawn = [plot.frame(lambda auc: f"{auc:.2f}"), plot.level(0.5, "chance")]
    for number, (_, values) in enumerate(series):
        shift = (number - (len(series) - 1) / 2) * 7
        for level, point in zip(levels, values, strict=True):
            if point is not None:
                drawn.append(
                    plot.whisker(plot.x(level) + shift, point.value, point.low, point.high, f"series-{number + 1}")
                )
    spoken = "; ".join(
        f"{name}: "
        + ", ".join(f"{each.value:.2f} at {level:.2g}" for level, each in zip(levels, values, strict=True) if each)
        for name, values in series
    )
    return svg(title, f"{spoken}.", drawn)


def interval_mark(metric: Metric, start: float, end: float) -> Markup:
    """A value as a dot with its interval on a line from `start` to `end`, which clips it; its baseline as a tick."""
    span = (end - start) or 1.0

    def place(x: float) -> str:
        return f"{4 + 112 * min(max((x - start) / span, 0.0), 1.0):.1f}"

    tick = ""
    if metric.baseline is not None:
        x = place(metric.baseline)
        tick = f'<line class="baseline" x1="{x}" x2="{x}" y1="2" y2="16"/>'
    return Markup(
        '<svg class="mark" viewBox="0 0 120 18" aria-hidden="true"><line class="rail" x1="4" x2="116" y1="9" y2="9"/>'
        f'{tick}<line class="reach" x1="{place(metric.low)}" x2="{place(metric.high)}" y1="9" y2="9"/>'
        f'<circle cx="{place(metric.value)}" cy="9" r="3.6"/></svg>'
    )


def _top(share: float, root: bool) -> float:
    """The upper end of an axis of shares: a round number whose parts are fit to be read."""
    # Of a root scale the lines lie at 1, 4, 9 and 16 sixteenths.
    even = (0.002, 0.004, 0.008, 0.012, 0.02, 0.04, 0.08, 0.12, 0.16, 0.2, 0.24, 0.32, 0.4, 0.6, 0.8)
    ends = (0.0016, 0.004, 0.008, 0.016, 0.032, 0.08, 0.16, 0.32, 0.64) if root else even
    return next((end for end in ends if share <= end), 1.0)


def _median(edges: Sequence[float], counts: Sequence[float]) -> float:
    passed, half = 0.0, sum(counts) / 2
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        passed += count
        if passed >= half:
            return (start + end) / 2
    return edges[-1]
