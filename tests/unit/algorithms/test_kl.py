"""KL estimators: values, signs, and what their gradients are in expectation."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_r1.algorithms.kl import KlKind, kl_estimate

LOGITS = torch.tensor([0.3, -1.2, 0.9, 0.0, -0.4], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([-0.5, 0.7, 0.2, 0.1, -1.0], dtype=torch.float64), dim=0)


def test_values_by_hand() -> None:
    log_probs, reference = torch.tensor([-1.0]), torch.tensor([-3.0])
    assert kl_estimate(log_probs, reference, "k1").item() == 2.0
    assert kl_estimate(log_probs, reference, "k2").item() == 2.0
    assert kl_estimate(log_probs, reference, "k3").item() == pytest.approx(math.exp(-2) + 1)
    assert kl_estimate(reference, log_probs, "k3").item() == pytest.approx(math.exp(2) - 3)


def test_k3_is_not_clamped() -> None:
    value = kl_estimate(torch.tensor([-50.0]), torch.tensor([-1.0]), "k3").item()
    assert value == pytest.approx(math.exp(49) - 50, rel=1e-5)


def test_k3_is_never_negative_even_where_float32_is_coarse() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.randint(-9, 2, (20000,), generator=generator)
    difference = torch.randn(20000, generator=generator) * scale
    value = kl_estimate(difference, torch.zeros(20000), "k3")
    assert (value >= 0).all()
    # The textbook spelling does go negative on these inputs.
    assert (torch.exp(-difference) + difference - 1 < 0).any()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_unbiased(kind: KlKind) -> None:
    policy = torch.log_softmax(LOGITS, dim=0)
    exact = (policy.exp() * (policy - REFERENCE)).sum()
    expectation = (policy.exp() * kl_estimate(policy, REFERENCE, kind)).sum()
    torch.testing.assert_close(expectation, exact)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_expected_gradient_as_a_loss_term(kind: KlKind) -> None:
    """E_{x ~ policy}[grad k(x)]: 0 for k1, the reverse KL's for k2, the forward KL's for k3."""
    logits = LOGITS.clone().requires_grad_()
    policy = torch.log_softmax(logits, dim=0)
    sampled = (policy.detach().exp() * kl_estimate(policy, REFERENCE, kind)).sum()
    (gradient,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    exact = {
        "k1": 0 * policy.sum(),
        "k2": (policy.exp() * (policy - REFERENCE)).sum(),
        "k3": (REFERENCE.exp() * (REFERENCE - policy)).sum(),
    }[kind]
    (expected,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]
