"""What charts on pages are drawn with: inline SVG in the colours of the page, without scripts."""

import zlib
from collections.abc import Callable, Iterator, Sequence

from markupsafe import Markup, escape

# Units of the drawing; on the page it is as wide as its place.
WIDTH, HEIGHT = 460, 196
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 14, 26


def line_chart(
    title: str,
    rounds: Sequence[int],
    series: Sequence[tuple[str, Sequence[float | None]]],
    shown: Callable[[float], str],
    faint: Sequence[Sequence[float | None]] = (),
) -> Markup:
    """Values by round as lines.

    Args:
        title: for screen readers, together with the first and the last value of each series.
        rounds: (n,) ascending.
        series: two at most: name, and n values, None where there is none.
        shown: a value as text, at the axis.
        faint: further values to draw thinly behind them.
    """
    found = [value for values in (*(values for _, values in series), *faint) for value in values if value is not None]
    low, high = min(found, default=0.0), max(found, default=1.0)
    reach = (high - low) * 0.08 or abs(high) * 0.08 or 1.0
    bottom = 0.0 if low >= 0 and low - reach < 0 else low - reach
    plot = Plot(rounds[0], rounds[-1], bottom, high + reach, whole=True)
    drawn = [plot.frame(shown), *(plot.curve(rounds, values, "faint") for values in faint)]
    drawn += [plot.curve(rounds, values, f"series-{number}") for number, (_, values) in enumerate(series, 1)]
    return svg(title, " ".join(_spoken(name, values, shown) for name, values in series), drawn)


def bar_chart(title: str, edges: Sequence[float], values: Sequence[float]) -> Markup:
    """Bars from 0 between edges, (n + 1,) ascending, of n values of 0 or more; `title` is for screen readers."""
    plot = Plot(edges[0], edges[-1], 0.0, max(values) * 1.08 or 1.0)
    spoken = ", ".join(f"{value:.3g}" for value in values)
    return svg(
        title,
        f"{spoken}.",
        [plot.frame(lambda value: f"{value:.3g}"), plot.steps(edges, values, "series-1", filled=True)],
    )


def _spoken(name: str, values: Sequence[float | None], shown: Callable[[float], str]) -> str:
    there = [value for value in values if value is not None]
    return f"{name}: from {shown(there[0])} to {shown(there[-1])}." if there else f"{name}: no values."


class Plot:
    """Maps values to positions in a chart, and draws there.

    Args:
        left, right, bottom, top: the values at its sides.
        whole: whether what lies across are whole numbers.
    """

    def __init__(self, left: float, right: float, bottom: float, top: float, *, whole: bool = False) -> None:
        self._left, self._right, self._bottom, self._top = left, right, bottom, top
        self._least_step = 1.0 if whole else 0.0

    def x(self, value: float) -> float:
        """Where a value lies across."""
        return _LEFT + (value - self._left) / ((self._right - self._left) or 1) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Where a value lies upward."""
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
            for value in _ticks(self._left, self._right, 6, self._least_step)
        ]
        return "".join(lines)

    def _heights(self) -> Iterator[float]:
        if self._bottom == 0:
            return (self._top * quarter / 4 for quarter in range(5))
        return _ticks(self._bottom, self._top, 4)

    def steps(self, edges: Sequence[float], values: Sequence[float], kind: str, filled: bool) -> str:
        """The outline of bars between the edges, (n + 1,), of n values."""
        path = [f"M{self.x(edges[0]):.1f} {self.y(0):.1f}"]
        for start, end, value in zip(edges[:-1], edges[1:], values, strict=True):
            path.append(f"L{self.x(start):.1f} {self.y(value):.1f}H{self.x(end):.1f}")
        path.append(f"V{self.y(0):.1f}")
        return f'<path class="{kind} {"filled" if filled else "outline"}" d="{"".join(path)}"/>'

    def upright(self, value: float, words: str) -> str:
        """A line at a value across, and what it is called."""
        line = _line("threshold", self.x(value), _TOP - 4, self.x(value), HEIGHT - _BOTTOM)
        return line + _text(self.x(value) + 5, _TOP + 6, words, "start", "threshold-words")

    def level(self, value: float, words: str) -> str:
        """A line at a value upward, and what it is called."""
        line = _line("threshold", _LEFT, self.y(value), WIDTH - _RIGHT, self.y(value))
        return line + _text(WIDTH - _RIGHT, self.y(value) + 14, words, "end", "threshold-words")

    def whisker(self, x: float, value: float, low: float, high: float, kind: str) -> str:
        """A value as a dot with its interval; `x` is a position, not a value."""
        line = _line(f"{kind} reach", x, self.y(low), x, self.y(high))
        return f'{line}<circle class="{kind} dot" cx="{x:.1f}" cy="{self.y(value):.1f}" r="4"/>'

    def curve(self, xs: Sequence[float], values: Sequence[float | None], kind: str) -> str:
        """Values joined by a line, which is broken where there is none; a value alone is a dot."""
        parts: list[list[tuple[float, float]]] = [[]]
        for x, value in zip(xs, values, strict=True):
            if value is None:
                parts.append([])
            else:
                parts[-1].append((self.x(x), self.y(value)))
        return "".join(_path(points, kind) for points in parts if points)


def _path(points: Sequence[tuple[float, float]], kind: str) -> str:
    if len(points) == 1:
        return f'<circle class="{kind} dot" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2.5"/>'
    return f'<path class="{kind} outline" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def svg(title: str, description: str, drawn: Sequence[str]) -> Markup:
    """The drawing, with a title and a description for screen readers."""
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


def _ticks(low: float, high: float, wanted: int, least_step: float = 0.0) -> Iterator[float]:
    """Round numbers from `low` to `high`, about as many as wanted."""
    step = max(least_step, _round_up((high - low) / wanted))
    number = -(-low // step)
    while number * step <= high + step * 1e-6:
        yield number * step
        number += 1


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** int(f"{value:e}".split("e")[1])
    return next((each * power for each in (1, 2, 2.5, 5) if each * power >= value * (1 - 1e-9)), 10 * power)
