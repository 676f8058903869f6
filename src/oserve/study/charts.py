"""Charts as SVG text, for pages that must load nothing: lines, steps and stacked areas."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = (
    "#2166ac", "#b2182b", "#1b7837", "#d9772b", "#762a83", "#01665e", "#8c510a", "#c51b7d",
    "#4d4d4d", "#5aae61", "#6a51a3", "#e08214", "#35978f", "#de77ae", "#878787", "#bf812d",
)  # fmt: skip
_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 30, 44


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Points in order of x; ``steps``: the value holds until the next point."""

    name: str
    points: Sequence[tuple[float, float]]
    steps: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Labels; ``log_x``: a logarithmic x axis. ``mark_x``, ``mark_y``: lines at a limit."""

    title: str
    x: str
    y: str
    log_x: bool = False
    mark_x: float | None = None
    mark_y: float | None = None
    y_from_zero: bool = True


def line_chart(axes: Axes, lines: Sequence[Line], *, colours: dict[str, str]) -> str:
    """One chart; lines without points are left out."""
    drawn = [line for line in lines if line.points]
    if not drawn:
        return ""
    frame = _Frame(axes, [point for line in drawn for point in line.points])
    parts = [frame.ground()]
    for line in drawn:
        places = [(frame.x(x), frame.y(y)) for x, y in line.points]
        path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
        for x, y in places[1:]:
            path += f"H{x:.1f}V{y:.1f}" if line.steps else f"L{x:.1f} {y:.1f}"
        colour = colours.get(line.name, COLOURS[0])
        parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6">'
            f"<title>{html.escape(line.name)}</title></path>"
        )
    return _svg(parts, axes.title)


def area_chart(axes: Axes, moments: Sequence[float], layers: Sequence[Line]) -> str:
    """Layers stacked on one another; each has a value for every moment."""
    if not moments or not layers:
        return ""
    totals = [0.0] * len(moments)
    bands = []
    for layer in layers:
        below = list(totals)
        totals = [total + point[1] for total, point in zip(totals, layer.points, strict=True)]
        bands.append((layer.name, below, list(totals)))
    frame = _Frame(axes, [(at, value) for at, value in zip(moments, totals, strict=True)])
    parts = [frame.ground()]
    for place, (name, below, above) in enumerate(bands):
        upper = [
            f"{frame.x(at):.1f} {frame.y(v):.1f}" for at, v in zip(moments, above, strict=True)
        ]
        lower = [
            f"{frame.x(at):.1f} {frame.y(v):.1f}" for at, v in zip(moments, below, strict=True)
        ]
        colour = COLOURS[place % len(COLOURS)]
        parts.append(
            f'<path d="M{"L".join(upper)}L{"L".join(reversed(lower))}Z" fill="{colour}" '
            f'fill-opacity="0.75"><title>{html.escape(name)}</title></path>'
        )
    return _svg(parts, axes.title)


def legend(names: Sequence[str], colours: dict[str, str]) -> str:
    """Names with their colours, as HTML."""
    return "".join(
        f'<span class="key"><i style="background:{colours[name]}"></i>{html.escape(name)}</span>'
        for name in names
    )


class _Frame:
    """From values to places in the picture, with axes and ticks."""

    def __init__(self, axes: Axes, points: Sequence[tuple[float, float]]) -> None:
        self._axes = axes
        xs = [x for x, _ in points if not axes.log_x or x > 0]
        ys = [y for _, y in points]
        marks_x = [] if axes.mark_x is None else [axes.mark_x]
        marks_y = [] if axes.mark_y is None else [axes.mark_y]
        self._low_x, self._high_x = _span([*(xs or [1.0]), *marks_x], log=axes.log_x)
        low_y, self._high_y = _span([*ys, *marks_y], log=False)
        self._low_y = min(0.0, low_y) if axes.y_from_zero else low_y

    def x(self, value: float) -> float:
        low, high = self._low_x, self._high_x
        if self._axes.log_x:
            value, low, high = (math.log10(max(v, self._low_x)) for v in (value, low, high))
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self._low_y) / (self._high_y - self._low_y)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def ground(self) -> str:
        axes, parts = self._axes, []
        floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        for value in _ticks(self._low_y, self._high_y, log=False):
            y = self.y(value)
            parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" class="grid"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="end">{value:g}</text>')
        for value in _ticks(self._low_x, self._high_x, log=axes.log_x):
            x = self.x(value)
            parts.append(f'<path d="M{x:.1f} {_TOP}V{floor}" class="grid"/>')
            parts.append(f'<text x="{x:.1f}" y="{floor + 16}" class="mid">{value:g}</text>')
        if axes.mark_x is not None:
            parts.append(f'<path d="M{self.x(axes.mark_x):.1f} {_TOP}V{floor}" class="mark"/>')
        if axes.mark_y is not None:
            parts.append(f'<path d="M{_LEFT} {self.y(axes.mark_y):.1f}H{right}" class="mark"/>')
        parts.append(f'<text x="{_LEFT}" y="18" class="title">{html.escape(axes.title)}</text>')
        middle = (_LEFT + right) / 2
        parts.append(
            f'<text x="{middle:.0f}" y="{_HEIGHT - 8}" class="mid">{html.escape(axes.x)}</text>'
        )
        parts.append(
            f'<text transform="translate(14 {(_TOP + floor) / 2:.0f}) rotate(-90)" class="mid">'
            f"{html.escape(axes.y)}</text>"
        )
        return "".join(parts)


def _span(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        low = max(low, high * 1e-4)
        return (low, high) if high > low else (low / 2, high * 2)
    return (low, high) if high > low else (low, low + 1.0)


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [10.0**power * part for power in decades for part in (1, 3)]
    else:
        size = 10.0 ** math.floor(math.log10((high - low) / 4))
        size *= next(part for part in (1, 2, 5, 10) if (high - low) / (size * part) <= 6)
        found = [round(size * k, 12) for k in range(math.ceil(low / size), int(high / size) + 1)]
    return [value for value in found if low <= value <= high * (1 + 1e-9)]


def _svg(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )
