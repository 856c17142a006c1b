"""The arithmetic of charts: from values to pixels, round ticks and their labels, smoothing,
thinning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.observe.names import Unit

Point = tuple[float, float]
"""(step, value)."""

MAX_POINTS = 400
"""Points drawn of a curve: about one a pixel, so that the report of 10,000 steps stays small."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The linear map of [low, high] onto [start, end] pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a value; the middle where low == high."""
        if self.high == self.low:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def tick_step(low: float, high: float, count: int) -> float:
    """The least of 1, 2, 2.5 and 5 times a power of ten that cuts [low, high] into <= count
    parts.
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))


def ticks(low: float, high: float, step: float) -> list[float]:
    """Multiples of `step` inside [low, high]."""
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def value_range(values: Sequence[float], unit: Unit, count: int = 5) -> tuple[float, float, float]:
    """(low, high, tick step) of the y axis: round bounds, from 0 unless the values lie far from it.

    Shares lie on 0..1, or from 0 to a round bound if none reaches a quarter.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if unit == "share":
        if high > 0.25 or high <= 0:
            return 0.0, 1.0, 0.25
        low = 0.0
    if 0 < low <= 0.6 * high:
        low = 0.0
    elif 0.6 * low <= high < 0:
        high = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(high) / 2 or 1.0
        low, high = low - pad, high + pad
    step = tick_step(low, high, count)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step


def tick_label(value: float, step: float, unit: Unit) -> str:
    """Label with just the digits that `step` needs.

    Examples: (0.25, 0.25, "share") -> "25%"; (1500, 500, "s") -> "1500"; (20000, 5000, "1") ->
    "20k".
    """
    if unit == "share":
        return f"{tick_label(100 * value, 100 * step, '1')}%"
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or step >= 1e3:
        return f"{value / 1e6:g}M" if step >= 1e5 and abs(value) >= 1e6 else f"{value / 1e3:g}k"
    if step < 1e-4:
        return f"{value:.2g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1  # a step of 2.5 needs one digit more than its power of ten
    return f"{value:.{decimals}f}"


def smooth(points: Sequence[Point]) -> list[Point]:
    """Centred moving mean over a twelfth of the curve, cut off at its ends; short curves stay."""
    half = len(points) // 25
    if half == 0:
        return list(points)
    result = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i - half) : i + half + 1]]
        result.append((x, sum(window) / len(window)))
    return result


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: the least and the greatest of each stretch, so that spikes stay."""
    if len(points) <= limit:
        return list(points)
    buckets = limit // 2
    kept: list[Point] = []
    for b in range(buckets):
        stretch = points[b * len(points) // buckets : (b + 1) * len(points) // buckets]
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept
