"""Line charts as SVG text, drawn here so that a report needs no library and no network.

`line_chart` gives one <svg>. Its colours are CSS variables of the page around it (COLOUR_CSS),
which follow the reader's light or dark setting. Pixels: x to the right, y downwards, origin top
left.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.observe.axes import (
    Point,
    Scale,
    smooth,
    thin,
    tick_label,
    tick_step,
    ticks,
    value_range,
)
from megatron_r1.observe.names import Unit, format_value

LIGHT = {
    "c0": "#0072b2",
    "c1": "#c4500a",
    "c2": "#00806a",
    "c3": "#a8508c",
    "ink": "#1c2430",
    "faint": "#667085",
    "grid": "#e4e7ec",
    "panel": "#ffffff",
    "bad": "#b42318",
}
DARK = {
    "c0": "#5ab4f0",
    "c1": "#f59a4c",
    "c2": "#3cc9a4",
    "c3": "#dd8fc2",
    "ink": "#e6e9ef",
    "faint": "#98a2b3",
    "grid": "#2b3340",
    "panel": "#171c24",
    "bad": "#ff8a80",
}
"""Series colours after Okabe and Ito, which colour-blind readers tell apart; shifted for
contrast.
"""


def _variables(colours: dict[str, str]) -> str:
    return ":root { " + " ".join(f"--{name}: {value};" for name, value in colours.items()) + " }"


COLOUR_CSS = f"{_variables(LIGHT)}\n@media (prefers-color-scheme: dark) {{ {_variables(DARK)} }}\n"

CHART_CSS = """
svg.chart text { fill: var(--faint);
  font: 11px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
svg.chart text.title { font-size: 13px; font-weight: 600; fill: var(--ink); }
svg.chart .ground { fill: var(--panel); }
svg.chart .grid { stroke: var(--grid); stroke-width: 1; }
svg.chart .axis { stroke: var(--faint); stroke-width: 1; }
svg.chart .raw { fill: none; stroke-width: 1; opacity: .32; }
svg.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg.chart .dash { stroke-dasharray: 4 4; stroke-width: 1.5; opacity: .75; }
svg.chart .dot { stroke: var(--panel); stroke-width: 1.5; }
svg.chart .bad { stroke: var(--bad); stroke-width: 1.5; }
svg.chart text.label { fill: var(--ink); font-weight: 600; paint-order: stroke;
  stroke: var(--panel); stroke-width: 4px; stroke-linejoin: round; }
"""
CHART_CSS += "".join(
    f"svg.chart .s{i} {{ stroke: var(--c{i}); }}\nsvg.chart .f{i} {{ fill: var(--c{i}); }}\n" for i in range(4)
)


@dataclass(kw_only=True, slots=True)
class Series:
    """One curve of a chart."""

    name: str
    points: list[Point]  # in order of steps; values may be NaN or infinite
    marks: bool = False  # a few measurements: dots with their values, joined by a dashed line
    smoothed: bool = True  # False for curves without noise, such as the learning rate


@dataclass(kw_only=True, frozen=True, slots=True)
class _Frame:
    x: Scale
    y: Scale
    unit: Unit


def line_chart(
    title: str,
    series: Sequence[Series],
    unit: Unit,
    *,
    x_label: str = "optimizer step",
    width: int = 440,
    height: int = 250,
    hover: bool = True,
) -> str:
    """One <svg>: faint raw values under a smoothed line, axes with units, a legend.

    A value that is not finite becomes a red tick on the x axis. hover: put the values into the
    attribute data-hover, from which the page's script shows them under the pointer.
    """
    legend, rows = _legend(series, width)
    values = [y for one in series for _, y in one.points if math.isfinite(y)]
    steps = [x for one in series for x, _ in one.points] or [0.0, 1.0]
    first = 0.0 if 0 < min(steps) <= 0.1 * max(steps) else min(steps)
    low, high, y_step = value_range(values, unit)
    # beside the last dots stand their values
    right = width - (58.0 if any(one.marks for one in series) else 18.0)
    frame = _Frame(
        x=Scale(first, max(steps), 56.0, right),
        y=Scale(low, high, height - 38.0, 36.0 + 16.0 * rows),
        unit=unit,
    )
    parts = [f'<text class="title" x="12" y="20">{_text(_with_unit(title, unit))}</text>', *legend]
    parts += _y_grid(frame, y_step) + _x_grid(frame.x, x_label, height - 38.0, width)
    for i, one in enumerate(series):
        parts += _curve(one, i % 4, frame)
    label = html.escape(f"{title}. {'; '.join(_last_values(series, unit))}")
    data = f' data-hover="{html.escape(_hover_data(series, frame))}"' if hover else ""
    head = f'class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}"{data}'
    return f"<svg {head}>{''.join(parts)}</svg>"


def svg_file(charts: Sequence[str], width: int, height: int) -> str:
    """A complete SVG file with charts of equal size side by side, on a ground of its own."""
    total = width * len(charts)
    placed = "".join(
        chart.replace("<svg ", f'<svg x="{i * width}" width="{width}" height="{height}" ', 1)
        for i, chart in enumerate(charts)
    )
    size = f'width="{total}" height="{height}" viewBox="0 0 {total} {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" {size}>'
        f"<style>{COLOUR_CSS}{CHART_CSS}</style>"
        f'<rect class="ground" width="{total}" height="{height}" rx="8"/>{placed}</svg>\n'
    )


def _finite(one: Series) -> list[Point]:
    return [point for point in one.points if math.isfinite(point[1])]


def _last_values(series: Sequence[Series], unit: Unit) -> list[str]:
    last = [(one.name, _finite(one)[-1:]) for one in series]
    return [f"{name}: {format_value(points[0][1], unit)} last" for name, points in last if points]


def _hover_data(series: Sequence[Series], frame: _Frame) -> str:
    data = {
        "x": [frame.x.low, frame.x.high, frame.x.start, frame.x.end],
        "y": [frame.y.low, frame.y.high, frame.y.start, frame.y.end],
        "share": frame.unit == "share",
        "series": [
            {
                "name": one.name,
                "points": [[_short(x, 8), _short(y, 4)] for x, y in thin(_finite(one))],
            }
            for one in series
        ],
    }
    return json.dumps(data, separators=(",", ":"))


def _short(value: float, digits: int) -> float | int:
    # whole numbers without ".0": the page holds thousands of them
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() else short


def _with_unit(title: str, unit: Unit) -> str:
    return title if unit in ("share", "1", "ratio", "reward", "count") else f"{title} ({unit})"


def _text(text: str) -> str:
    return html.escape(text, quote=False)


def _legend(series: Sequence[Series], width: int) -> tuple[list[str], int]:
    # (parts, rows); a single curve is named by the title
    parts: list[str] = []
    if len(series) < 2:
        return parts, 1
    x, row = 12.0, 1
    for i, one in enumerate(series):
        wide = 21 + 6.3 * len(one.name)  # 6.3 px: an average glyph at 11 px
        if x > 12 and x + wide > width:
            x, row = 12.0, row + 1
        y = 20 + 16 * row
        kind = f"line s{i % 4}{' dash' if one.marks else ''}"
        parts.append(_line(kind, x, y - 4, x + 16, y - 4))
        parts.append(f'<text x="{x + 21:g}" y="{y}">{_text(one.name)}</text>')
        x += wide + 14
    return parts, row


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _y_grid(frame: _Frame, step: float) -> list[str]:
    parts = []
    for value in ticks(frame.y.low, frame.y.high, step):
        y = frame.y(value)
        parts.append(_line("grid", frame.x.start, y, frame.x.end, y))
        label = tick_label(value, step, frame.unit)
        place = f'x="{frame.x.start - 7:g}" y="{y + 4:.1f}" text-anchor="end"'
        parts.append(f"<text {place}>{label}</text>")
    return parts


def _x_grid(axis: Scale, label: str, bottom: float, width: int) -> list[str]:
    parts = [_line("axis", axis.start, bottom, axis.end, bottom)]
    step = 1.0
    if axis.high > axis.low:
        step = max(step, tick_step(axis.low, axis.high, max(2, width // 90)))
    texts = [(axis(v), 16, tick_label(v, step, "count")) for v in ticks(axis.low, axis.high, step)]
    parts += [_line("axis", x, bottom, x, bottom + 4) for x, _, _ in texts]
    texts.append(((axis.start + axis.end) / 2, 32, _text(label)))
    parts += [f'<text x="{x:.1f}" y="{bottom + down:g}" text-anchor="middle">{text}</text>' for x, down, text in texts]
    return parts


def _curve(one: Series, colour: int, frame: _Frame) -> list[str]:
    points = _finite(one)
    odd = [point for point in one.points if not math.isfinite(point[1])]
    bottom = frame.y.start
    parts = [_line("bad", frame.x(x), bottom - 7, frame.x(x), bottom) for x, _ in odd]
    if one.marks:
        return parts + _marks(points, colour, frame)
    smoothed = smooth(points) if one.smoothed else points
    if smoothed != points:
        parts.append(_polyline(thin(points), f"raw s{colour}", frame))
    parts.append(_polyline(thin(smoothed), f"line s{colour}", frame))
    return parts + ([_dot(points[0], colour, frame)] if len(points) == 1 else [])


def _marks(points: Sequence[Point], colour: int, frame: _Frame) -> list[str]:
    parts = [_polyline(points, f"line dash s{colour}", frame)]
    parts += [_dot(point, colour, frame) for point in points]
    for x, y in dict.fromkeys([*points[:1], *points[-1:]]):
        place = f'x="{frame.x(x) + 9:.1f}" y="{frame.y(y) + 4:.1f}"'
        parts.append(f'<text class="label" {place}>{format_value(y, frame.unit)}</text>')
    return parts


def _dot(point: Point, colour: int, frame: _Frame) -> str:
    place = f'cx="{frame.x(point[0]):.1f}" cy="{frame.y(point[1]):.1f}" r="4.5"'
    return f'<circle class="dot f{colour}" {place}/>'


def _polyline(points: Sequence[Point], kind: str, frame: _Frame) -> str:
    # the clamp: shares are drawn on 0..1 even if rounding made one 1.0000001
    pixels = " ".join(f"{frame.x(x):.1f},{frame.y(min(max(y, frame.y.low), frame.y.high)):.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{pixels}"/>'
