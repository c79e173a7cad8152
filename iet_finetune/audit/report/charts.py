"""Charts of the report as inline SVG, in the colours of the page and without scripts."""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence

from markupsafe import Markup, escape

from ..measures.metrics import Metric

# Units of the drawing; on the page it is as wide as its place.
WIDTH, HEIGHT = 460, 196
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 14, 26


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
    plot = _Plot(edges[0], edges[-1], 0.0, math.sqrt(top) if root else top)
    if root:
        shares = [(name, [math.sqrt(value) for value in values]) for name, values in shares]
    drawn = [plot.frame(lambda height: f"{100 * (height**2 if root else height):.2g} %")]
    for number, (_, values) in enumerate(shares):
        drawn.append(plot.steps(edges, values, f"series-{number + 1}", filled=number == 0))
    if threshold is not None:
        drawn.append(plot.upright(*threshold))
    middles = ", ".join(f"{name}: median about {_median(edges, counts):.3g}" for name, counts in series)
    return _svg(title, f"{axis}. {middles}.", drawn)


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
    plot = _Plot(min(levels) - reach, max(levels) + reach, max(0.0, low - 0.02), min(1.0, high + 0.02))
    drawn = [plot.frame(lambda auc: f"{auc:.2f}"), plot.level(0.5, "chance")]
    for number, (_, values) in enumerate(series):
        shift = (number - (len(series) - 1) / 2) * 7
        for level, point in zip(levels, values, strict=True):
            if point is not None:
                drawn.append(plot.whisker(level, point, shift, f"series-{number + 1}"))
    spoken = "; ".join(
        f"{name}: "
        + ", ".join(f"{each.value:.2f} at {level:.2g}" for level, each in zip(levels, values, strict=True) if each)
        for name, values in series
    )
    return _svg(title, f"{spoken}.", drawn)


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


class _Plot:
    """Maps values to positions in a chart."""

    def __init__(self, left: float, right: float, bottom: float, top: float) -> None:
        self._left, self._right, self._bottom, self._top = left, right, bottom, top

    def x(self, value: float) -> float:
        return _LEFT + (value - self._left) / ((self._right - self._left) or 1) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return (
            HEIGHT - _BOTTOM - (value - self._bottom) / ((self._top - self._bottom) or 1) * (HEIGHT - _TOP - _BOTTOM)
        )

    def frame(self, shown: Callable[[float], str]) -> str:
        """Grid lines, and the numbers at both axes."""
        lines = []
        for value in self._heights():
            lines.append(_line("grid", _LEFT, self.y(value), WIDTH - _RIGHT, self.y(value)))
            lines.append(_text(_LEFT - 6, self.y(value) + 4, shown(value), "end"))
        lines += [
            _text(self.x(value), HEIGHT - _BOTTOM + 16, f"{value:.3g}", "middle")
            for value in _ticks(self._left, self._right, 6)
        ]
        return "".join(lines)

    def _heights(self) -> Iterator[float]:
        if self._bottom == 0:
            return (self._top * quarter / 4 for quarter in range(5))
        return _ticks(self._bottom, self._top, 4)

    def steps(self, edges: Sequence[float], values: Sequence[float], kind: str, filled: bool) -> str:
        path = [f"M{self.x(edges[0]):.1f} {self.y(0):.1f}"]
        for start, end, value in zip(edges[:-1], edges[1:], values, strict=True):
            path.append(f"L{self.x(start):.1f} {self.y(value):.1f}H{self.x(end):.1f}")
        path.append(f"V{self.y(0):.1f}")
        return f'<path class="{kind} {"filled" if filled else "outline"}" d="{"".join(path)}"/>'

    def upright(self, value: float, words: str) -> str:
        line = _line("threshold", self.x(value), _TOP - 4, self.x(value), HEIGHT - _BOTTOM)
        return line + _text(self.x(value) + 5, _TOP + 6, words, "start", "threshold-words")

    def level(self, value: float, words: str) -> str:
        line = _line("threshold", _LEFT, self.y(value), WIDTH - _RIGHT, self.y(value))
        return line + _text(WIDTH - _RIGHT, self.y(value) + 14, words, "end", "threshold-words")

    def whisker(self, level: float, metric: Metric, shift: float, kind: str) -> str:
        x = self.x(level) + shift
        line = _line(f"{kind} reach", x, self.y(metric.low), x, self.y(metric.high))
        return f'{line}<circle class="{kind} dot" cx="{x:.1f}" cy="{self.y(metric.value):.1f}" r="4"/>'


def _svg(title: str, description: str, drawn: Sequence[str]) -> Markup:
    number = f"{zlib.crc32(f'{title}{description}'.encode('utf-8', 'replace')):08x}"
    labels = f'role="img" aria-labelledby="chart-{number} words-{number}"'
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" {labels}>'
        f'<title id="chart-{number}">{escape(title)}</title><desc id="words-{number}">{escape(description)}</desc>'
        f"{''.join(drawn)}</svg>"
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _ticks(low: float, high: float, wanted: int) -> Iterator[float]:
    """Round numbers from `low` to `high`, about as many as wanted."""
    step = _round_up((high - low) / wanted)
    number = -(-low // step)
    while number * step <= high + step * 1e-6:
        yield number * step
        number += 1


def _top(share: float, root: bool) -> float:
    """The upper end of an axis of shares: a round number whose parts are fit to be read."""
    # Of a root scale the lines lie at 1, 4, 9 and 16 sixteenths.
    even = (0.002, 0.004, 0.008, 0.012, 0.02, 0.04, 0.08, 0.12, 0.16, 0.2, 0.24, 0.32, 0.4, 0.6, 0.8)
    ends = (0.0016, 0.004, 0.008, 0.016, 0.032, 0.08, 0.16, 0.32, 0.64) if root else even
    return next((end for end in ends if share <= end), 1.0)


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** int(f"{value:e}".split("e")[1])
    return next((each * power for each in (1, 2, 2.5, 5) if each * power >= value * (1 - 1e-9)), 10 * power)


def _median(edges: Sequence[float], counts: Sequence[float]) -> float:
    passed, half = 0.0, sum(counts) / 2
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        passed += count
        if passed >= half:
            return (start + end) / 2
    return edges[-1]
