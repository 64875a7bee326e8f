"""Plots of a report, as SVG whose colours follow the page and whose texts are texts.

Every plot is drawn twice, for a phone and for a wide window; the style sheet shows one of them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["STYLE", "Point", "boxes", "dots", "front", "trade"]

_NARROW, _WIDE = 340, 760
_FONT = 12
# Width of a letter over the size of the font, a little more than that of usual fonts.
_LETTER = 0.62

STYLE = """
svg.chart{display:block;margin:.4rem 0}svg.wide{display:block}svg.narrow{display:none}
@media (max-width:52rem){svg.wide{display:none}svg.narrow{display:block}}
.chart text{font:12px system-ui,sans-serif;fill:var(--ink)}.chart .soft{fill:var(--soft)}
.chart .grid{stroke:var(--line)}.chart .line{stroke:var(--ink);fill:none}
.chart .thin{stroke:var(--soft);fill:none}.chart .lead{stroke:var(--line);fill:none}
.chart .best{fill:var(--good);stroke:var(--good)}
.chart .front{stroke:var(--good);fill:none;stroke-dasharray:4 3}
.chart .other{fill:var(--paper);stroke:var(--soft);stroke-width:1.5}
.chart .box{fill:var(--tint);stroke:var(--soft)}
.chart .d0{fill:#3b82c4}.chart .d1{fill:#d9822b}.chart .d2{fill:#5a9e4b}.chart .d3{fill:#b0569c}
.chart .d4{fill:#8a7a3c}.chart .d5{fill:#3aa6a0}
"""
_COLOURS = 6


@dataclass(frozen=True)
class Point:
    """An engine in the plot of accuracy against latency.

    Attributes:
        name: What it is called.
        x: Latency in ms.
        y: Accuracy in %.
        low, high: Quartiles of the latency.
    """

    name: str
    x: float
    y: float
    low: float
    high: float


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both ways (Pareto), from fast to slow.

    >>> [p.name for p in front([Point("a", 1, 80, 1, 1), Point("b", 2, 70, 2, 2)])]
    ['a']
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def trade(points: Sequence[Point]) -> str:
    """Accuracy against latency of all engines, each with its name, and the front among them."""
    return _both(lambda width: _trade(points, width), "accuracy against latency of all engines")


def boxes(rows: Sequence[tuple[str, Sequence[float]]], unit: str) -> str:
    """Quartiles, 5 to 95% and the median of several samples, on one axis that begins at 0.

    Args:
        rows: Name and values.
        unit: Title of the axis.
    """
    spans = [(name, *np.percentile(values, [5, 25, 50, 75, 95])) for name, values in rows]
    high = max(float(span[5]) for span in spans)

    def row(i: int, scale: Callable[[float], float], y: float) -> Iterator[str]:
        low, first, median, third, top = (scale(float(v)) for v in spans[i][1:])
        yield f'<path class="thin" d="M{low:.1f} {y:.1f}H{top:.1f}"/>'
        yield (
            f'<rect class="box" x="{first:.1f}" y="{y - 6:.1f}" '
            f'width="{max(third - first, 1):.1f}" height="12"/>'
        )
        yield f'<path class="line" stroke-width="2" d="M{median:.1f} {y - 6:.1f}v12"/>'

    names = [name for name, _ in rows]
    values = [f"{span[3]:.2f}" for span in spans]
    return _rows(names, values, (0.0, high), unit, row)


def dots(
    rows: Sequence[tuple[str, Sequence[float | None], float | None]],
    groups: Sequence[str],
    unit: str,
) -> str:
    """A mark for each group on a line for each row, and a bar for the row's mean.

    Args:
        rows: Name, a value of every group (None where there is none), mean or None.
        groups: What the marks stand for.
        unit: Title of the axis.
    """
    known = [v for _, values, _ in rows for v in values if v is not None]
    low, high = min(known), max(known)
    room = max((high - low) * 0.05, 0.5)

    def row(i: int, scale: Callable[[float], float], y: float) -> Iterator[str]:
        _, values, mean = rows[i]
        if mean is not None:
            yield f'<path class="line" stroke-width="2" d="M{scale(mean):.1f} {y - 9:.1f}v18"/>'
        for group, value in enumerate(values):
            if value is not None:
                yield _mark(group, scale(value), y)

    legend = " ".join(
        f'<span><svg class="chart" style="display:inline;vertical-align:middle" width="14" '
        f'height="14" viewBox="0 0 14 14">{_mark(i, 7, 7)}</svg> {html.escape(group)}</span>'
        for i, group in enumerate(groups)
    )
    means = ["-" if mean is None else f"{mean:.1f}" for _, _, mean in rows]
    plot = _rows([name for name, _, _ in rows], means, (low - room, high + room), unit, row)
    return f'<p class="legend">{legend} <span>| harmonic mean</span></p>{plot}'


def _both(draw: Callable[[int], str], title: str) -> str:
    """The plot for both widths; ``draw`` gives what is inside, behind its height and a space."""
    parts = []
    for kind, width in (("wide", _WIDE), ("narrow", _NARROW)):
        height, _, inside = draw(width).partition(" ")
        parts.append(
            f'<svg class="chart {kind}" role="img" aria-label="{html.escape(title)}" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{inside}</svg>'
        )
    return "".join(parts)


def _mark(group: int, x: float, y: float) -> str:
    """A mark whose form and colour tell groups apart."""
    colour = f'class="d{group % _COLOURS}"'
    return (
        f'<circle {colour} cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
        f'<rect {colour} x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>',
        f'<path {colour} d="M{x:.1f} {y - 6:.1f}l5.5 10h-11z"/>',
        f'<path {colour} d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"/>',
        f'<path {colour} d="M{x:.1f} {y + 6:.1f}l5.5 -10h-11z"/>',
    )[group % 5]


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _width(words: str) -> float:
    return len(words) * _FONT * _LETTER


def _short(words: str, room: float) -> str:
    most = max(int(room / (_FONT * _LETTER)), 4)
    return words if len(words) <= most else f"{words[: most - 1]}…"


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two values, at most so many.

    >>> _ticks(0, 1.0, 5)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    span = high - low if high > low else 1.0
    power = 10 ** math.floor(math.log10(span / most))
    steps = [power * f for f in (1, 2, 2.5, 5, 10, 20, 25, 50)]
    step = next(s for s in steps if span / s <= most - 1 + 1e-9)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 10) for i in range(count)]


def _rows(
    names: Sequence[str],
    values: Sequence[str],
    span: tuple[float, float],
    unit: str,
    row: Callable[[int, Callable[[float], float], float], Iterator[str]],
) -> str:
    """A plot of a line for each name, its value in digits at the right, and an axis below."""

    def draw(width: int) -> str:
        narrow = width == _NARROW
        digits = max(_width(value) for value in values) + 6
        left = 6.0 if narrow else min(max(_width(name) for name in names) + 12, width * 0.4)
        right, pitch = width - digits - 8, 42.0 if narrow else 28.0
        low, high = span
        bottom = pitch * len(names) + 6

        def scale(value: float) -> float:
            return left + (right - left) * (value - low) / ((high - low) or 1.0)

        parts = []
        for tick in _ticks(low, high, 5 if narrow else 8):
            x = scale(tick)
            parts.append(f'<path class="grid" d="M{x:.1f} 4V{bottom:.1f}"/>')
            parts.append(_text(x, bottom + 15, f"{tick:g}", "middle", "soft"))
        for i, (name, value) in enumerate(zip(names, values, strict=True)):
            y = pitch * i + (28 if narrow else 16)
            if narrow:
                parts.append(_text(left, y - 13, _short(name, right - left)))
            else:
                parts.append(_text(left - 10, y + 4, _short(name, left - 12), "end"))
            parts += row(i, scale, y)
            parts.append(_text(width - 2, y + 4, value, "end"))
        parts.append(_text(right, bottom + 31, unit, "end", "soft"))
        return f"{bottom + 38:.0f} {''.join(parts)}"

    return _both(draw, unit)


def _trade(points: Sequence[Point], width: int) -> str:
    height = 320 if width == _NARROW else 380
    left, right, top, bottom = 44.0, width - 10.0, 10.0, height - 42.0
    xs = [v for p in points for v in (p.low, p.high, p.x)]
    x_room = (max(xs) - min(xs) or max(xs)) * 0.12
    ys = [p.y for p in points]
    y_room = (max(ys) - min(ys) or 1.0) * 0.12
    x_low, x_high = max(min(xs) - x_room, 0.0), max(xs) + x_room
    y_low, y_high = min(ys) - y_room, max(ys) + y_room

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * (x - x_low) / (x_high - x_low),
            bottom - (bottom - top) * (y - y_low) / (y_high - y_low),
        )

    parts = []
    for tick in _ticks(x_low, x_high, 5 if width == _NARROW else 9):
        x, _ = at(tick, y_low)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(_text(x, bottom + 16, f"{tick:g}", "middle", "soft"))
    for tick in _ticks(y_low, y_high, 7):
        _, y = at(x_low, tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(_text(left - 6, y + 4, f"{tick:g}", "end", "soft"))
    best = front(points)
    path = ""
    for i, point in enumerate(best):
        x, y = at(point.x, point.y)
        path += f"H{x:.1f}V{y:.1f}" if i else f"M{x:.1f} {y:.1f}"
    parts.append(f'<path class="front" d="{path}"/>')
    for point in points:
        (x0, y), (x1, _) = at(point.low, point.y), at(point.high, point.y)
        parts.append(f'<path class="thin" d="M{x0:.1f} {y:.1f}H{x1:.1f}"/>')
    for point in points:
        x, y = at(point.x, point.y)
        kind = "best" if point in best else "other"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    places = [(*at(p.x, p.y), at(p.low, p.y)[0], at(p.high, p.y)[0]) for p in points]
    names = [_short(p.name, right - left - 20) for p in points]
    parts += _labels(names, places, (left, right, top, bottom))
    parts.append(_text(right, bottom + 34, "median latency, ms", "end", "soft"))
    parts.append(_text(left - 38, height - 6, "accuracy, %", "start", "soft"))
    return f"{height} {''.join(parts)}"


_Box = tuple[float, float, float, float]


def _labels(
    names: Sequence[str], places: Sequence[tuple[float, float, float, float]], frame: _Box
) -> Iterator[str]:
    """Names beside their points, where they cover neither points nor each other.

    Args:
        names: Of the points.
        places: Of every point x and y, and where its quartiles begin and end.
        frame: Left, right, top and bottom of the plot.
    """
    taken: list[_Box] = []
    for x, y, low, high in places:
        taken += [(x - 6, x + 6, y - 6, y + 6), (low, high, y - 1, y + 1)]
    order = sorted(range(len(names)), key=lambda i: places[i][1])
    for i in order:
        x, y, low, high = places[i]
        ends = min(x - 9, low - 4), max(x + 9, high + 4)
        box, far = _free(names[i], x, y, ends, frame, taken)
        taken.append(box)
        if far:
            end = min(max(x, box[0]), box[1])
            yield f'<path class="lead" d="M{x:.1f} {y:.1f}L{end:.1f} {(box[2] + box[3]) / 2:.1f}"/>'
        yield _text(box[0], box[3] - 3, names[i])


def _free(
    name: str,
    x: float,
    y: float,
    ends: tuple[float, float],
    frame: _Box,
    taken: Sequence[_Box],
) -> tuple[_Box, bool]:
    """The nearest place for a name inside the frame, and whether it needs a line to its point."""
    left, right, top, bottom = frame
    wide, high = _width(name), _FONT + 3.0
    candidates = []
    for ring in range(12):
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
            reach = 14.0 * ring
            beside = ends[1] + reach if dx > 0 else ends[0] - reach - wide
            x0 = x - wide / 2 if dx == 0 else beside
            y0 = y - high / 2 + dy * (reach + 11)
            x0 = min(max(x0, left), right - wide)
            candidates.append(((x0, x0 + wide, y0, y0 + high), ring > 0))
    for box, far in candidates:
        inside = box[2] >= top - 6 and box[3] <= bottom
        if inside and not any(_meet(box, other) for other in taken):
            return box, far
    return candidates[0]


def _meet(a: _Box, b: _Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
