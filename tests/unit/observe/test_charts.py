"""Charts: data to pixels by hand, ticks, labels, smoothing, thinning, valid SVG."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from megatron_r1.observe.axes import (
    Scale,
    smooth,
    thin,
    tick_label,
    tick_step,
    ticks,
    value_range,
)
from megatron_r1.observe.charts import Series, line_chart, svg_file


def parse(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def lines(chart: str, kind: str) -> list[list[tuple[float, float]]]:
    found = [e for e in parse(chart).iter("polyline") if e.get("class", "").startswith(kind)]
    return [
        [tuple(map(float, pair.split(","))) for pair in e.get("points", "").split()]  # type: ignore[misc]
        for e in found
    ]


def test_points_land_on_the_pixels_computed_by_hand() -> None:
    # plot area: x 56..422 (440 - 18), y 212 (250 - 38) up to 52 (36 + one legend row of 16)
    # x axis 0..100: 25 -> 56 + 0.25 * 366 = 147.5; y axis 0..100%: 0.25 -> 212 - 0.25 * 160 = 172
    series = Series(name="accuracy", points=[(0, 0.0), (25, 0.25), (100, 1.0)])
    assert lines(line_chart("Accuracy", [series], "share"), "line") == [[(56.0, 212.0), (147.5, 172.0), (422.0, 52.0)]]


def test_marks_are_dots_with_their_first_and_last_value() -> None:
    # dots narrow the plot: x 56..382 (440 - 58)
    series = Series(name="held-out", points=[(0, 0.25), (50, 0.5), (100, 0.75)], marks=True)
    chart = line_chart("Accuracy", [series], "share")
    dots = [(e.get("cx"), e.get("cy")) for e in parse(chart).iter("circle")]
    assert dots == [("56.0", "172.0"), ("219.0", "132.0"), ("382.0", "92.0")]
    labels = [e.text for e in parse(chart).iter("text") if e.get("class") == "label"]
    assert labels == ["25.0%", "75.0%"]


def test_grid_lines_and_labels_stand_at_their_values() -> None:
    chart = line_chart("Loss", [Series(name="x", points=[(0, 1.0), (10, 4.0)])], "nats")
    grid = [float(e.get("y1", "")) for e in parse(chart).iter("line") if e.get("class") == "grid"]
    assert grid == [212.0, 172.0, 132.0, 92.0, 52.0]  # 0, 1, 2, 3, 4 over 160 pixels
    texts = [e.text for e in parse(chart).iter("text")]
    assert texts[:6] == ["Loss (nats)", "0", "1", "2", "3", "4"]
    assert texts[-1] == "optimizer step"


def test_values_that_are_not_finite_become_red_ticks_and_no_pixels() -> None:
    points = [(0, 1.0), (5, math.nan), (10, math.inf), (20, 2.0)]
    chart = line_chart("Loss", [Series(name="x", points=points)], "1")
    red = [float(e.get("x1", "")) for e in parse(chart).iter("line") if e.get("class") == "bad"]
    assert red == [147.5, 239.0]  # 5/20 and 10/20 of 56..422
    assert len(lines(chart, "line")[0]) == 2
    assert "nan" not in chart.lower()


@pytest.mark.parametrize("points", [[], [(3, 2.0)], [(0, 0.0), (1, 0.0)], [(0, math.nan)]])
def test_degenerate_curves_are_drawn_without_error(points: list[tuple[float, float]]) -> None:
    chart = line_chart("T", [Series(name="x", points=points)], "1")
    parse(chart)
    assert not re.search(r'"(nan|inf)', chart)


def test_hover_data_hold_the_raw_values_and_axes() -> None:
    series = [Series(name='a"<b>', points=[(0, 0.25), (10, 0.123456)])]
    data = json.loads(parse(line_chart("T", series, "share")).get("data-hover", ""))
    assert data == {
        "x": [0, 10, 56.0, 422.0],
        "y": [0.0, 0.25, 212.0, 52.0],
        "share": True,
        "series": [{"name": 'a"<b>', "points": [[0, 0.25], [10, 0.1235]]}],
    }


def test_hostile_names_stay_text() -> None:
    chart = line_chart("<b>", [Series(name="</svg><script>", points=[(0, 1)])] * 2, "1")
    assert "<script" not in chart and "<b>" not in chart
    assert [e.text for e in parse(chart).iter("text")][:2] == ["<b>", "</svg><script>"]


def test_many_series_wrap_their_legend() -> None:
    series = [Series(name=f"a rather long name {i}", points=[(0, 0.5)]) for i in range(5)]
    chart = line_chart("T", series, "share")
    rows = {e.get("y") for e in parse(chart).iter("text") if (e.text or "").startswith("a rather")}
    assert rows == {"36", "52", "68"}  # two names of 158 pixels fit into 440
    assert lines(chart, "line")[0] == [(239.0, 148.0)]  # 0.5 between 212 and 36 + 3 * 16


def test_svg_file_is_complete_and_puts_charts_side_by_side() -> None:
    series = [Series(name="x", points=[(0, 0.5), (1, 1.0)])]
    charts = [line_chart("T", series, "share", width=300, height=200, hover=False)] * 2
    root = parse(svg_file(charts, 300, 200))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert (root.get("width"), root.get("viewBox")) == ("600", "0 0 600 200")
    inner = root.findall("{http://www.w3.org/2000/svg}svg")
    assert [e.get("x") for e in inner] == ["0", "300"]
    assert all(e.get("data-hover") is None for e in inner)
    style = root.find("{http://www.w3.org/2000/svg}style")
    assert style is not None and "prefers-color-scheme: dark" in (style.text or "")


def test_scale() -> None:
    down = Scale(10.0, 20.0, 200.0, 0.0)
    assert [down(v) for v in (10, 15, 20)] == [200.0, 100.0, 0.0]
    assert Scale(1.0, 1.0, 0.0, 50.0)(1.0) == 25.0


@pytest.mark.parametrize(
    ("low", "high", "count", "step"),
    [(0, 100, 5, 20), (0, 1, 5, 0.2), (0, 7, 5, 2), (0, 11, 5, 2.5), (3, 4, 2, 0.5), (0, 9, 1, 10)],
)
def test_tick_step(low: float, high: float, count: int, step: float) -> None:
    assert tick_step(low, high, count) == pytest.approx(step)


def test_ticks_lie_inside() -> None:
    assert ticks(0.0, 1.0, 0.25) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(1.0, 600.0, 200.0) == [200.0, 400.0, 600.0]


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([0.1, 0.9], "share", (0.0, 1.0, 0.25)),
        ([0.0], "share", (0.0, 1.0, 0.25)),
        ([0.001, 0.04], "share", (0.0, 0.04, 0.01)),
        ([38.0, 98.0], "tokens", (0.0, 100.0, 20.0)),  # near zero: from zero
        ([14300.0, 16200.0], "tokens/s", (14000.0, 16500.0, 500.0)),  # far from it: cut
        ([-3.0, -1.0], "1", (-3.0, 0.0, 1.0)),
        ([0.0003, 0.0003], "1", (0.0001, 0.0005, 0.0001)),
        ([], "1", (0.0, 1.0, 0.2)),
    ],
)
def test_value_range(values: list[float], unit: str, expected: tuple[float, float, float]) -> None:
    assert value_range(values, unit) == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "step", "unit", "text"),
    [
        (0.25, 0.25, "share", "25%"),
        (0.0125, 0.0025, "share", "1.25%"),
        (1500, 500, "s", "1500"),
        (20000, 5000, "1", "20k"),
        (14500, 500, "1", "14.5k"),
        (8000, 2000, "1", "8k"),
        (2e6, 1e6, "1", "2M"),
        (7.5, 2.5, "1", "7.5"),
        (0.3, 0.1, "1", "0.3"),
        (3e-6, 1e-6, "1", "3e-06"),
        (0, 0.1, "1", "0"),
    ],
)
def test_tick_label(value: float, step: float, unit: str, text: str) -> None:
    assert tick_label(value, step, unit) == text  # type: ignore[arg-type]


def test_smoothing_is_the_mean_of_the_neighbours() -> None:
    short = [(float(i), float(i * i)) for i in range(24)]
    assert smooth(short) == short
    points = [(float(i), float(i % 3 == 0)) for i in range(50)]  # window: 2 each side
    smoothed = smooth(points)
    assert smoothed[10] == (10.0, pytest.approx(2 / 5))  # of 8..12: 9 and 12
    assert smoothed[0] == (0.0, pytest.approx(1 / 3))  # of 0..2
    assert smoothed[49] == (49.0, pytest.approx(1 / 3))  # of 47..49: 48


def test_thinning_keeps_spikes_and_order() -> None:
    points = [(float(i), 0.0) for i in range(10_000)]
    points[7_777] = (7_777.0, 9.0)
    points[1_234] = (1_234.0, -5.0)
    kept = thin(points, 100)
    assert len(kept) <= 100
    assert (7_777.0, 9.0) in kept and (1_234.0, -5.0) in kept
    assert kept == sorted(kept)
    assert thin(points[:100], 100) == points[:100]
