"""The pairwise loss and its slopes, by hand and against autograd."""

from __future__ import annotations

import math

import torch

from megatron_r1.algorithms.preference_loss import pairwise_loss


def test_by_hand() -> None:
    losses, slopes = pairwise_loss(torch.tensor([[2.0, 2.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    assert losses.tolist() == [
        math.log(2),
        math.log1p(math.exp(-1)),
        math.log1p(math.exp(1)),
    ]
    expected = [0.5, 1 / (1 + math.exp(1)), 1 / (1 + math.exp(-1))]
    torch.testing.assert_close(slopes[:, 1], torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)
    assert torch.equal(slopes[:, 0], -slopes[:, 1])


def test_slopes_are_the_derivative() -> None:
    values = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    values.requires_grad_()
    losses, slopes = pairwise_loss(values)
    reference = -torch.nn.functional.logsigmoid(values[:, 0] - values[:, 1])
    reference.sum().backward()
    torch.testing.assert_close(losses, reference.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(slopes, values.grad, rtol=1e-14, atol=0)
    assert not losses.requires_grad and not slopes.requires_grad


def test_far_apart_values_stay_finite() -> None:
    losses, slopes = pairwise_loss(torch.tensor([[1e4, -1e4], [-1e4, 1e4]]))
    assert losses.tolist() == [0.0, 2e4]
    assert slopes.tolist() == [[0.0, 0.0], [-1.0, 1.0]]
