"""Draws figures as inline SVG: axes with units, a legend, and a tooltip at each point. No script, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 720
HEIGHT: Final = 340
LEFT, RIGHT, TOP, BOTTOM = 74, 18, 12, 52
PLOT_WIDTH, PLOT_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
BAR_WIDTH: Final = 64.0
COLORS: Final = 8  # the style sheet defines --s0 to --s7

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """A line with a gap where y is None. hint: returns the tooltip of a point."""

    name: str
    points: Sequence[tuple[float, float | None]]
    color: int
    dashed: bool = False
    hint: Callable[[float, float], str] | None = None


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis. kind: "linear" from 0, "log", or "percentile": a log axis of 1 / (1 - p) with labels of p."""

    label: str
    kind: str = "linear"


@dataclass(frozen=True, slots=True)
class Layer:
    """A colour of stacked bars. values: its height in each bar. hints: its tooltip in each bar."""

    name: str
    values: Sequence[float]
    color: int
    hints: Sequence[str]


class _Axis:
    """A scale with its range. `at` maps values to positions between 0 and 1."""

    def __init__(self, scale: Scale, values: Sequence[float]):
        self.scale = scale
        self.is_log = scale.kind != "linear"
        usable = [value for value in values if value > 0] if self.is_log else list(values)
        low, high = (min(usable), max(usable)) if usable else (1.0, 10.0)
        if self.is_log:
            self.low = math.floor(math.log10(low) + 1e-9) if scale.kind == "log" else 0.0
            self.high = max(math.log10(high), self.low + 1)
            if scale.kind == "log":
                self.high = max(math.ceil(self.high - 1e-9), self.low + 1)
        else:
            self.low, self.high = 0.0, high * 1.04 or 1.0

    def at(self, value: float) -> float:
        value = math.log10(max(value, 1e-12)) if self.is_log else value
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        if self.scale.kind == "percentile":
            return [(10.0**k, percentile_name(k)) for k in range(int(self.high) + 1)]
        if self.is_log:
            return [(10.0**k, number(10.0**k)) for k in range(math.ceil(self.low), int(self.high) + 1)]
        step = nice_step(self.high / 6)
        return [(i * step, number(i * step)) for i in range(int(self.high / step) + 1)]


def percentile_name(nines: int) -> str:
    """Return the percentile with that many nines: 0 -> "0", 1 -> "90", 3 -> "99.9"."""
    return "0" if nines == 0 else f"{100 - 100 / 10**nines:.{max(nines - 2, 0)}f}"


def nice_step(least: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= least * 0.999)


def number(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.6g}M"
    return f"{value / 1e3:.6g}k" if value >= 10_000 else f"{value:.6g}"


def figure(title: str, x: Scale, y: Scale, series: Sequence[Series], note: str = "") -> str:
    """Return a <figure> of lines, "" if they have no points. Values outside of a log axis are drawn on its edge."""
    shown = [line for line in series if any(py is not None for _, py in line.points)]
    if not shown:
        return ""
    points = [(px, py) for line in shown for px, py in line.points if py is not None]
    x_axis, y_axis = _Axis(x, [px for px, _ in points]), _Axis(y, [py for _, py in points])

    def place(point: Point) -> Point:
        return LEFT + x_axis.at(point[0]) * PLOT_WIDTH, TOP + (1 - y_axis.at(point[1])) * PLOT_HEIGHT

    ticks = [(LEFT + x_axis.at(value) * PLOT_WIDTH, name) for value, name in x_axis.ticks()]
    lines = [f'<line class="grid" x1="{px:.1f}" x2="{px:.1f}" y1="{TOP}" y2="{TOP + PLOT_HEIGHT}"/>' for px, _ in ticks]
    drawn = [part for line in shown for part in draw_line(line, place)]
    legend = [legend_item(line.name, line.color, " dashed" * line.dashed) for line in shown]
    return frame(title, legend, [*lines, *axes(ticks, x.label, y_axis), *drawn], note)


def bars(title: str, x_label: str, y: Scale, names: Sequence[str], layers: Sequence[Layer], note: str = "") -> str:
    """Return a <figure> of stacked bars, a bar for each name, the first layer at the bottom; "" if all are empty."""
    tops = [sum(layer.values[i] for layer in layers) for i in range(len(names))]
    if not any(tops):
        return ""
    y_axis = _Axis(y, tops)
    room = PLOT_WIDTH / len(names)
    width = min(0.7 * room, BAR_WIDTH)
    ticks = [(LEFT + (i + 0.5) * room, escape(name)) for i, name in enumerate(names)]
    drawn, below = [], [0.0] * len(names)
    for layer in layers:
        for i, value in enumerate(layer.values):
            low, high = (TOP + (1 - y_axis.at(height)) * PLOT_HEIGHT for height in (below[i], below[i] + value))
            below[i] += value
            hint = f"<title>{escape(names[i])}, {escape(layer.name)}: {escape(layer.hints[i])}</title>"
            path = f"M{ticks[i][0] - width / 2:.1f} {low:.1f}h{width:.1f}V{high:.1f}h-{width:.1f}Z"
            drawn.append(f'<g class="bar c{layer.color % COLORS}">{hint}<path d="{path}"/></g>')
    # The legend has the order of the stack, from the top down.
    legend = [legend_item(layer.name, layer.color, " filled") for layer in reversed(layers)]
    return frame(title, legend, [*axes(ticks, x_label, y_axis), *drawn], note)


def legend_item(name: str, color: int, kind: str) -> str:
    return f'<li><span class="key{kind} c{color % COLORS}"></span>{escape(name)}</li>'


def frame(title: str, legend: Sequence[str], drawn: Sequence[str], note: str) -> str:
    body = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    caption = f'<p class="note">{escape(note)}</p>' if note else ""
    keys = "".join(legend)
    return f'<figure><figcaption>{escape(title)}</figcaption><ul class="legend">{keys}</ul>{body}{caption}</figure>'


def axes(ticks: Sequence[tuple[float, str]], x_label: str, y_axis: _Axis) -> list[str]:
    """Draw both axes. ticks: position in the picture and text of each tick of the x axis."""
    parts = [
        f'<text class="tick" x="{px:.1f}" y="{TOP + PLOT_HEIGHT + 17}" text-anchor="middle">{name}</text>'
        for px, name in ticks
    ]
    for value, name in y_axis.ticks():
        py = TOP + (1 - y_axis.at(value)) * PLOT_HEIGHT
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + PLOT_WIDTH}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{name}</text>')
    middle_x, middle_y = LEFT + PLOT_WIDTH / 2, TOP + PLOT_HEIGHT / 2
    x_text, y_text = escape(x_label), escape(y_axis.scale.label)
    parts.append(f'<text class="axis x" x="{middle_x}" y="{HEIGHT - 10}" text-anchor="middle">{x_text}</text>')
    turned = f'transform="rotate(-90 16 {middle_y})"'
    parts.append(f'<text class="axis y" x="16" y="{middle_y}" text-anchor="middle" {turned}>{y_text}</text>')
    return parts


def draw_line(line: Series, place: Callable[[Point], Point]) -> list[str]:
    color = f"c{line.color % COLORS}"
    parts, run = [], list[Point]()
    for px, py in [*line.points, (0.0, None)]:
        if py is not None:
            run.append((px, py))
        elif run:
            path = "M" + "L".join("{:.1f} {:.1f}".format(*place(point)) for point in run)
            parts.append(f'<path class="line {color}{" dashed" if line.dashed else ""}" d="{path}"/>')
            run = []
    radius = 3 if len(line.points) <= 30 else 1.5
    for px, py in line.points:
        if py is None or (line.dashed and line.hint is None):
            continue
        cx, cy = place((px, py))
        text = f"<title>{escape(line.name)}: {escape(line.hint(px, py))}</title>" if line.hint else ""
        parts.append(f'<circle class="dot {color}" cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}">{text}</circle>')
    return parts
