"""DAPO's overlong penalty at its corners, with the paper's own lengths."""

from __future__ import annotations

import pytest

from megatron_r1.algorithms.shaping import overlong_penalty
from megatron_r1.config.grpo import OverlongConfig


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, 0.0),
        (16384, 0.0),  # L_max - L_cache: still free
        (16385, -1 / 4096),
        (18432, -0.5),
        (20479, -4095 / 4096),
        (20480, -1.0),  # L_max: the linear part ends at -1
        (20481, -1.0),
        (10**6, -1.0),
    ],
)
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_corners(length: int, expected: float, factor: float) -> None:
    config = OverlongConfig(max_length=20480, buffer=4096, factor=factor)
    assert overlong_penalty(length, config) == factor * expected


def test_a_buffer_as_long_as_the_limit_punishes_from_the_first_token() -> None:
    config = OverlongConfig(max_length=4, buffer=4)
    assert [overlong_penalty(n, config) for n in range(6)] == [0, -0.25, -0.5, -0.75, -1, -1]
