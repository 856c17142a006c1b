"""The log-prob head equals log_softmax of the whole logits in float64, values and gradients, and never holds them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_r1.model import log_prob_head
from megatron_r1.model.log_prob_head import token_log_probs
from tests.reference.full_logits import full_logits_log_probs
from tests.reference.log_probs import slow_log_probs

VOCAB, PADDED, NUMBER, HIDDEN = 11, 16, 7, 5
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def case(rows: int = VOCAB, number: int = NUMBER, dtype: torch.dtype = torch.float32) -> Inputs:
    """Hidden states [N, H], output weights [rows, H], targets [N] and the gradient [N] that arrives from above.

    Rows that pad the vocabulary have logits that would take all the probability.
    """
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(number, HIDDEN, generator=draw).to(dtype).requires_grad_()
    weight = (1.5 * torch.randn(rows, HIDDEN, generator=draw)).to(dtype)
    weight[VOCAB:] = 40.0
    return (
        hidden,
        weight.requires_grad_(),
        torch.randint(0, VOCAB, (number,), generator=draw),
        torch.randn(number, generator=draw),
    )


def slow(inputs: Inputs, temperature: float) -> list[torch.Tensor]:
    """Log-probs, entropy, gradients of hidden states and weights by definition, in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in inputs[:2])
    log_probs, entropy = slow_log_probs((hidden @ weight.T)[None], inputs[2][None], VOCAB, temperature)
    gradients = torch.autograd.grad((log_probs[0] * inputs[3]).sum(), (hidden, weight))
    return [log_probs[0].detach(), entropy[0].detach(), *gradients]


def fast(inputs: Inputs, temperature: float, block_rows: int | None = None) -> list[torch.Tensor]:
    """The same from the head."""
    hidden, weight, targets, above = inputs
    log_probs, entropy = token_log_probs(
        hidden, weight, targets, vocab_size=VOCAB, temperature=temperature, block_rows=block_rows
    )
    assert log_probs.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    return [log_probs.detach(), entropy, *torch.autograd.grad((log_probs * above).sum(), (hidden, weight))]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], bound: float = 1e-6) -> None:
    """Every tensor within `bound` of its largest entry."""
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=bound * right.abs().max().item())


@pytest.mark.parametrize("block_rows", [None, 1, 3, VOCAB, PADDED, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("rows", [VOCAB, PADDED])
def test_values_and_gradients_equal_the_definition(rows: int, temperature: float, block_rows: int | None) -> None:
    inputs = case(rows)
    found = fast(inputs, temperature, block_rows)
    assert_equal(found, slow(inputs, temperature))
    assert torch.equal(found[3][VOCAB:], torch.zeros(rows - VOCAB, HIDDEN)), "padding has no gradient"


def test_the_default_block_divides_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case(PADDED)
    rows_seen: list[int] = []
    plain = log_prob_head._block_logits

    def seen(*arguments: Any) -> torch.Tensor:
        logits = plain(*arguments)
        rows_seen.append(logits.shape[1])
        return logits

    monkeypatch.setattr(log_prob_head, "_block_logits", seen)
    monkeypatch.setitem(log_prob_head.BLOCK_BYTES, "cpu", 4 * 4 * NUMBER)  # four rows of seven tokens
    assert_equal(fast(inputs, 1.0), slow(inputs, 1.0))
    assert rows_seen == [4, 4, 3] * 2, "blocks of the forward, then of the backward; none of the padding"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_logits_agree(temperature: float) -> None:
    """The benchmark's plain path computes the same thing."""
    hidden, weight, targets, above = inputs = case(PADDED)
    log_probs, entropy = full_logits_log_probs(hidden, weight, targets, vocab_size=VOCAB, temperature=temperature)
    gradients = torch.autograd.grad((log_probs * above).sum(), (hidden, weight))
    assert_equal([log_probs.detach(), entropy, *gradients], slow(inputs, temperature))


@pytest.mark.parametrize("block_rows", [None, 4])
def test_bf16_weights(block_rows: int | None) -> None:
    """Logits of up to 10 are rounded to eight bits, so they are off by 2^-9 of themselves; all else is float32."""
    inputs = case(PADDED, dtype=torch.bfloat16)
    found, expected = fast(inputs, 0.7, block_rows), slow(inputs, 0.7)
    assert [x.dtype for x in found[2:]] == [torch.bfloat16, torch.bfloat16]
    largest = (inputs[0].double() @ inputs[1][:VOCAB].double().T).abs().max().item() / 0.7
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=2 * largest * 2**-9)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=0, atol=2 * largest * 2**-9)
    assert_equal(found[2:], expected[2:], bound=2**-6)


def test_hidden_states_are_taken_to_the_weights_type_and_their_gradient_back() -> None:
    """A bf16 trunk under a float32 head: products in float32, only the returned gradient is rounded."""
    hidden, weight, targets, above = case()
    inputs = (hidden.detach().bfloat16().requires_grad_(), weight, targets, above)
    found, expected = fast(inputs, 0.7), slow(inputs, 0.7)
    assert found[2].dtype == torch.bfloat16 and found[3].dtype == torch.float32
    assert_equal([found[0], found[1], found[3]], [expected[0], expected[1], expected[3]])
    torch.testing.assert_close(found[2].double(), expected[2], rtol=2**-8, atol=1e-6)


def test_no_tokens_still_reach_every_input() -> None:
    hidden, weight, targets, _ = case(PADDED, number=0)
    log_probs, entropy = token_log_probs(hidden, weight, targets, vocab_size=VOCAB)
    assert log_probs.shape == entropy.shape == (0,)
    log_probs.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, HIDDEN)
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(PADDED, HIDDEN))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_costs_no_product(frozen: int) -> None:
    inputs = case(PADDED)
    expected = slow(inputs, 1.0)
    inputs[frozen].requires_grad_(False)
    log_probs, _ = token_log_probs(*inputs[:3], vocab_size=VOCAB, block_rows=VOCAB)
    with Largest() as seen:
        (log_probs * inputs[3]).sum().backward()
    assert inputs[frozen].grad is None
    assert_equal([inputs[1 - frozen].grad], [expected[3 - frozen]])
    assert seen.calls["mm"] == 2, "the logits again, and one gradient"


def test_without_gradients_there_is_the_forward_alone() -> None:
    inputs = case(PADDED)
    with torch.no_grad(), Largest() as seen:
        log_probs, entropy = token_log_probs(*inputs[:3], vocab_size=VOCAB, temperature=0.6, block_rows=4)
    assert not log_probs.requires_grad and seen.calls["mm"] == 3
    assert_equal([log_probs, entropy], slow(inputs, 0.6)[:2])


def test_by_hand() -> None:
    """Weights 1 : 2 : 1 at temperature 1, and 1 : 4 : 1 at temperature 1/2."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(2)], [0.0]], requires_grad=True)
    log_prob, entropy = token_log_probs(hidden, weight, torch.tensor([1]), vocab_size=3, block_rows=2)
    log_prob.sum().backward()
    assert log_prob.item() == pytest.approx(math.log(1 / 2), abs=1e-7)
    assert entropy.item() == pytest.approx(1.5 * math.log(2), abs=1e-7)
    assert weight.grad.flatten().tolist() == pytest.approx([-0.25, 0.5, -0.25], abs=1e-7)
    assert hidden.grad.item() == pytest.approx(0.5 * math.log(2), abs=1e-7)
    log_prob, _ = token_log_probs(hidden, weight, torch.tensor([1]), vocab_size=3, temperature=0.5)
    assert log_prob.item() == pytest.approx(math.log(4 / 6), abs=1e-7)


@pytest.mark.parametrize("block_rows", [1, 2, 4])
def test_huge_logits_stay_exact(block_rows: int) -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[-3e38], [3e4], [3e4], [-3e4]], requires_grad=True)
    log_prob, entropy = token_log_probs(hidden, weight, torch.tensor([2]), vocab_size=4, block_rows=block_rows)
    log_prob.sum().backward()
    assert log_prob.item() == pytest.approx(-math.log(2), abs=1e-7)
    assert entropy.item() == pytest.approx(math.log(2), abs=1e-7)
    assert weight.grad.flatten().tolist() == [0.0, -0.5, 0.5, 0.0]


class Largest(TorchDispatchMode):
    """Counts operations by name and remembers the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        made = result if isinstance(result, (list, tuple)) else [result]
        self.elements = max([self.elements, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return result


def test_no_tensor_has_the_size_of_the_logits() -> None:
    """64 tokens, 1,000 words, blocks of 100: the largest tensor is one block, or the weights and their gradient."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 4, generator=draw, requires_grad=True)
    weight = torch.randn(1000, 4, generator=draw, requires_grad=True)
    targets = torch.randint(0, 1000, (64,), generator=draw)
    sizes = {}
    for name, score, block in (("head", token_log_probs, {"block_rows": 100}), ("plain", full_logits_log_probs, {})):
        with Largest() as seen:
            score(hidden, weight, targets, vocab_size=1000, **block)[0].sum().backward()
        sizes[name] = seen.elements
    assert sizes == {"head": 64 * 100, "plain": 64 * 1000}


def test_inputs_are_left_alone() -> None:
    inputs = case(PADDED)
    before = [x.detach().clone() for x in inputs]
    fast(inputs, 0.7)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
