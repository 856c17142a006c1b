"""Group advantages against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_r1.algorithms.advantage import group_advantages, has_signal
from megatron_r1.config.grpo import AdvantageConfig


def advantages(rewards: list[float], **keys: Any) -> list[float]:
    tensor = torch.tensor(rewards, dtype=torch.float64)
    return group_advantages(tensor, AdvantageConfig(**keys)).tolist()


def test_population_std_is_the_default() -> None:
    # mean 1/4, variance 3/16, std sqrt(3)/4: (3/4) / (sqrt(3)/4) = sqrt(3).
    assert advantages([1.0, 0.0, 0.0, 0.0], epsilon=0.0) == pytest.approx(
        [math.sqrt(3)] + [-1 / math.sqrt(3)] * 3, rel=1e-7
    )


def test_sample_std() -> None:
    # variance 3/4 / 3 = 1/4, std 1/2.
    assert advantages([1.0, 0.0, 0.0, 0.0], std="sample", epsilon=0.0) == pytest.approx(
        [1.5, -0.5, -0.5, -0.5], rel=1e-7
    )


def test_epsilon_is_added_to_the_standard_deviation() -> None:
    # std 2 about mean 3: 2 / (2 + 1).
    assert advantages([1.0, 5.0], epsilon=1.0) == pytest.approx([-2 / 3, 2 / 3], rel=1e-7)
    assert advantages([1.0, 3.0])[1] == pytest.approx(1 / (1 + 1e-6), abs=1e-7)


def test_scale_none_only_centres() -> None:
    assert advantages([1.0, 0.0, 0.0, 0.0], scale="none") == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("std", ["population", "sample"])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [0.1 + 0.2, 0.3], [1.0] * 16, [-1e6] * 7, [0.7], []])
def test_equal_rewards_give_exact_zeros(rewards: list[float], std: str) -> None:
    assert advantages(rewards, std=std, epsilon=0.0) == [0.0] * len(rewards)
    assert not has_signal(torch.tensor(rewards, dtype=torch.float64))
    assert not has_signal(torch.tensor(rewards, dtype=torch.float32))


def test_a_small_real_difference_is_signal() -> None:
    rewards = [1.0, 1.0 - 1 / 65536]  # one word of a very long answer
    assert has_signal(torch.tensor(rewards))
    assert advantages(rewards, epsilon=0.0) == [1.0, -1.0]


def test_computed_in_float64_returned_in_float32() -> None:
    rewards = 2.0**24 + torch.tensor([0, 1, 2], dtype=torch.float64)  # float32 merges two
    result = group_advantages(rewards, AdvantageConfig(epsilon=0.0))
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        advantages([0.0, bad])


def test_a_matrix_of_groups_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[G\]"):
        has_signal(torch.zeros(2, 3))
