"""Denominators and token weights, by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.algorithms.weights import Denominators, count, learned_tokens, token_weights
from megatron_r1.config.grpo import LossConfig
from megatron_r1.types import Sample

MASK = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
LENGTHS = torch.tensor([3, 1, 0])
ALL = Denominators(sequences=4, tokens=10)


def test_count() -> None:
    samples = [
        Sample(token_ids=[5, 6, 7, 8, 9], prompt_length=2),
        Sample(token_ids=[5, 6], prompt_length=2),  # nothing was answered: counts in N all the same
        Sample(token_ids=[5, 6, 7, 8], prompt_length=1, loss_mask=[1, 0, 1, 1]),
    ]
    # The mask at position 0 has no prediction to weigh.
    assert [learned_tokens(sample) for sample in samples] == [3, 0, 2]
    assert count(iter(samples)) == Denominators(sequences=3, tokens=5)
    assert count([]) == Denominators(sequences=0, tokens=0)


@pytest.mark.parametrize(
    ("keys", "fallback", "rows"),
    [
        ({"aggregation": "sequence-mean"}, None, [1 / 12, 1 / 4]),
        ({"aggregation": "token-mean"}, None, [1 / 10, 1 / 10]),
        ({"aggregation": "constant"}, 50, [1 / 200, 1 / 200]),
        ({"aggregation": "constant", "length_constant": 25}, 50, [1 / 100, 1 / 100]),
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float()], ids=["int", "bool", "float"])
def test_weights(keys: dict[str, str], fallback: int | None, rows: list[float], mask: torch.Tensor) -> None:
    a, b = rows
    expected = torch.tensor([[0, a, a, a], [b, 0, 0, 0], [0, 0, 0, 0]])
    config = LossConfig.model_validate(keys)
    weights = token_weights(mask, LENGTHS, ALL, config, fallback)
    assert torch.equal(weights, expected)
    # A context-parallel slice sees part of the mask and the full lengths.
    assert torch.equal(token_weights(mask[:, 2:], LENGTHS, ALL, config, fallback), expected[:, 2:])


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean", "constant"])
def test_denominators_of_zero_give_zeros(aggregation: str) -> None:
    config = LossConfig.model_validate({"aggregation": aggregation})
    weights = token_weights(MASK, LENGTHS, Denominators(sequences=0, tokens=0), config, 8)
    assert torch.equal(weights, torch.zeros(3, 4))


def test_constant_without_a_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="length_constant"):
        token_weights(MASK, LENGTHS, ALL, LossConfig(aggregation="constant"))
