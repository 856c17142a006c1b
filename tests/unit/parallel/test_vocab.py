"""Vocabulary log-probs equal log_softmax and gather, their gradient autograd's; padding does not exist."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_r1.parallel.vocab import log_probs_and_entropy
from tests.reference.log_probs import slow_log_probs

VOCAB, PADDED = 11, 16


def case(dtype: torch.dtype = torch.float32, width: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [2, 5, width], targets, and a gradient that arrives from above."""
    draw = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(2, 5, width, generator=draw)).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (2, 5), generator=draw)
    return logits, targets, torch.randn(2, 5, generator=draw)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("width", [VOCAB, PADDED])
def test_values_and_gradient_equal_the_definition(temperature: float, width: int) -> None:
    logits, targets, above = case(width=width)
    log_probs, entropy = log_probs_and_entropy(logits, targets, vocab_size=VOCAB, temperature=temperature)
    (log_probs * above).sum().backward()
    slow = logits.detach().double().requires_grad_()
    expected, expected_entropy = slow_log_probs(slow, targets, VOCAB, temperature)
    (expected * above).sum().backward()
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=3e-6)
    torch.testing.assert_close(logits.grad.double(), slow.grad, rtol=0, atol=1e-6)
    assert not entropy.requires_grad


def test_padding_gets_no_gradient_and_does_not_count() -> None:
    logits, targets, above = case(width=PADDED)
    with torch.no_grad():
        logits[..., VOCAB:] = 50.0  # would take all the probability
    log_probs, entropy = log_probs_and_entropy(logits, targets, vocab_size=VOCAB)
    (log_probs * above).sum().backward()
    assert torch.equal(logits.grad[..., VOCAB:], torch.zeros(2, 5, PADDED - VOCAB))
    assert logits.grad[..., :VOCAB].abs().min() > 0
    alone, entropy_alone = log_probs_and_entropy(logits.detach()[..., :VOCAB], targets, vocab_size=VOCAB)
    torch.testing.assert_close(log_probs, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, entropy_alone, rtol=0, atol=1e-6)


def test_bf16_logits_are_computed_in_float32() -> None:
    logits, targets, above = case(torch.bfloat16)
    log_probs, entropy = log_probs_and_entropy(logits, targets, vocab_size=VOCAB, temperature=0.7)
    (log_probs * above).sum().backward()
    slow = logits.detach().double().requires_grad_()
    expected, expected_entropy = slow_log_probs(slow, targets, VOCAB, 0.7)
    (expected * above).sum().backward()
    assert log_probs.dtype == entropy.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=3e-6)
    torch.testing.assert_close(logits.grad.double(), slow.grad, rtol=2**-8, atol=1e-6)


def test_by_hand() -> None:
    """Weights 1 : 2 : 1 at temperature 1, and 1 : 4 : 1 at temperature 1/2."""
    logits = torch.tensor([[[0.0, math.log(2), 0.0]]])
    target = torch.tensor([[1]])
    log_prob, entropy = log_probs_and_entropy(logits, target, vocab_size=3)
    assert log_prob.item() == pytest.approx(math.log(1 / 2), abs=1e-7)
    assert entropy.item() == pytest.approx(1.5 * math.log(2), abs=1e-7)
    log_prob, _ = log_probs_and_entropy(logits, target, vocab_size=3, temperature=0.5)
    assert log_prob.item() == pytest.approx(math.log(4 / 6), abs=1e-7)


def test_impossible_and_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[[-torch.inf, 3e4, 3e4, -3e4]]], requires_grad=True)
    log_prob, entropy = log_probs_and_entropy(logits, torch.tensor([[2]]), vocab_size=4)
    log_prob.sum().backward()
    assert log_prob.item() == pytest.approx(-math.log(2), abs=1e-7)
    assert entropy.item() == pytest.approx(math.log(2), abs=1e-7)
    assert logits.grad.tolist() == [[[0.0, -0.5, 0.5, 0.0]]]


def test_the_logits_are_left_alone() -> None:
    logits, targets, _ = case(width=PADDED)
    before = logits.detach().clone()
    log_probs_and_entropy(logits, targets, vocab_size=VOCAB)
    assert torch.equal(logits, before)
