"""The policy loss against the papers' formulas in plain Python loops, and its invariances."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_r1.algorithms.policy_loss import PolicyLoss, identity, policy_loss
from megatron_r1.algorithms.weights import Denominators, token_weights
from megatron_r1.config.grpo import LossConfig

CONSTANT = 11
Rows = list[list[float]]


class Batch:
    """Random float64 inputs: five sequences of seven positions, masks with holes, one empty."""

    def __init__(self, seed: int = 0, spread: float = 0.6) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.log_probs = -normal(5, 7).abs() - 0.1
        self.old = self.log_probs + spread * normal(5, 7)
        self.reference = self.log_probs + spread * normal(5, 7)
        self.advantages = torch.tensor([1.3, -0.7, -1.6, 0.0, 0.4], dtype=torch.float64)
        self.mask = torch.rand(5, 7, generator=generator) < 0.7
        self.mask[4] = False

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)

    @property
    def denominators(self) -> Denominators:
        return Denominators(sequences=5, tokens=int(self.mask.sum()))


def reference_loss(log_probs: Rows, batch: Batch, config: LossConfig) -> float:
    """Minus the objective of DeepSeekMath eq. 3 (or of its variants), term by term."""
    old, reference = batch.old.tolist(), batch.reference.tolist()
    advantages, mask = batch.advantages.tolist(), batch.mask.tolist()
    every_token = sum(sum(row) for row in mask)
    objective = 0.0
    for i, row in enumerate(log_probs):
        learned = [t for t in range(len(row)) if mask[i][t]]
        if not learned:
            continue
        mean_log_ratio = sum(row[t] - old[i][t] for t in learned) / len(learned)
        divisor = {
            "sequence-mean": len(mask) * len(learned),
            "token-mean": every_token,
            "constant": len(mask) * CONSTANT,
        }[config.aggregation]
        for t in learned:
            log_ratio = mean_log_ratio if config.ratio == "sequence" else row[t] - old[i][t]
            ratio = math.exp(log_ratio)
            upper = config.clip_low if config.clip_high is None else config.clip_high
            clipped = min(max(ratio, 1 - config.clip_low), 1 + upper)
            surrogate = min(ratio * advantages[i], clipped * advantages[i])
            if config.dual_clip is not None and advantages[i] < 0:
                surrogate = max(surrogate, config.dual_clip * advantages[i])
            u = math.exp(reference[i][t] - row[t])
            kl = {
                "k3": u - math.log(u) - 1,
                "k2": math.log(u) ** 2 / 2,
                "k1": -math.log(u),
                "none": 0.0,
            }[config.kl]
            objective += (surrogate - config.kl_coefficient * kl) / divisor
    return -objective


def reference_gradient(batch: Batch, config: LossConfig, step: float = 1e-6) -> Tensor:
    """Central differences of the reference loss."""
    gradient = torch.zeros_like(batch.log_probs)
    rows = batch.log_probs.tolist()
    for i, row in enumerate(rows):
        for t, value in enumerate(row):
            row[t] = value + step
            above = reference_loss(rows, batch, config)
            row[t] = value - step
            below = reference_loss(rows, batch, config)
            row[t] = value
            gradient[i, t] = (above - below) / (2 * step)
    return gradient


def run(
    batch: Batch,
    config: LossConfig,
    log_probs: Tensor,
    rows: slice = slice(None),
    columns: slice = slice(None),
    sum_over_context: Callable[[Tensor], Tensor] = identity,
    lengths: bool = True,
) -> PolicyLoss:
    """Our loss on a part of the batch, under the denominators of the whole."""
    part = (rows, columns)
    weights = token_weights(
        batch.mask[part],
        batch.lengths[rows],
        batch.denominators,
        config,
        CONSTANT,
        dtype=torch.float64,
    )
    return policy_loss(
        log_probs[part],
        batch.old[part],
        batch.advantages[rows],
        batch.mask[part],
        weights,
        config,
        reference_log_probs_BT=batch.reference[part],
        response_lengths_B=batch.lengths[rows] if lengths else None,
        sum_over_context=sum_over_context,
    )


def leaf(values: Tensor) -> Tensor:
    return values.clone().requires_grad_()


def gradient_of(loss: Tensor, log_probs: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return gradient


TIGHT: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
CASES: list[dict[str, Any]] = [
    {},
    {"kl_coefficient": 0.5},
    {"clip_low": 0.2},
    {**TIGHT, "kl": "none"},
    {**TIGHT, "kl": "k1", "kl_coefficient": 0.3},
    {**TIGHT, "kl": "k2", "kl_coefficient": 0.3},
    {**TIGHT, "kl_coefficient": 0.0},
    {**TIGHT, "dual_clip": 1.5},
    {"dual_clip": 1.2, "aggregation": "token-mean"},  # below the upper clip: still a bound
    {**TIGHT, "aggregation": "token-mean"},
    {**TIGHT, "aggregation": "constant"},
    {**TIGHT, "aggregation": "constant", "length_constant": CONSTANT},
    {"ratio": "sequence", "clip_low": 0.1, "clip_high": 0.05, "kl": "none"},
    {"ratio": "sequence", "clip_low": 0.1, "clip_high": 0.05, "aggregation": "token-mean"},
    {"ratio": "sequence", "aggregation": "constant", "dual_clip": 1.02},
]


@pytest.mark.parametrize("keys", CASES, ids=str)
def test_value_and_gradient_of_every_option(keys: dict[str, Any]) -> None:
    config = LossConfig(**keys)
    batch = Batch()
    log_probs = leaf(batch.log_probs)
    loss = run(batch, config, log_probs).loss
    expected = reference_loss(batch.log_probs.tolist(), batch, config)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient_of(loss, log_probs), reference_gradient(batch, config), rtol=1e-6, atol=1e-9)


def test_the_papers_objective_by_hand() -> None:
    """Defaults: epsilon 10, beta 0.001, k3, mean over a sequence, then over sequences."""
    old = torch.log(torch.tensor([[0.02, 0.5], [0.04, 0.0]], dtype=torch.float64) + 1e-300)
    log_probs = torch.log(torch.tensor([[0.4, 0.25], [0.8, 1.0]], dtype=torch.float64))
    reference = torch.log(torch.tensor([[0.4, 0.5], [0.4, 1.0]], dtype=torch.float64))
    mask = torch.tensor([[1, 1], [1, 0]])
    lengths, everything = torch.tensor([2, 1]), Denominators(sequences=2, tokens=3)
    config = LossConfig()
    weights = token_weights(mask, lengths, everything, config, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    result = policy_loss(log_probs, old, advantages, mask, weights, config, reference)
    # Sequence 0, A = 1: ratios 20 (clipped to 11) and 0.5, u = 1 and 2 (k3 = 1 - log 2).
    # Sequence 1, A = -1: ratio 20, unbounded below; u = 0.5 (k3 = log 2 - 0.5).
    first = (11 + 0.5 - 0.001 * (1 - math.log(2))) / 2
    second = -20 - 0.001 * (math.log(2) - 0.5)
    assert result.loss.item() == pytest.approx(-(first + second) / 2, rel=1e-12)
    metrics = {name: value.item() for name, value in result.metrics.items()}
    assert metrics == pytest.approx(
        {
            "tokens": 3,
            "ratio": 40.5,
            "clip_low": 0,
            "clip_high": 1,
            "dual_clip": 0,
            "kl_k1": 0.0,
            "kl_k3": 0.5,
        }
    )


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_metrics_count_what_was_clipped(ratio: str) -> None:
    batch = Batch(seed=4, spread=1.0)
    config = LossConfig.model_validate(
        {"clip_low": 0.2, "clip_high": 0.9, "dual_clip": 1.1, "ratio": ratio, "kl": "none"}
    )
    expected = dict.fromkeys(("tokens", "ratio", "clip_low", "clip_high", "dual_clip"), 0.0)
    for i, t in batch.mask.nonzero().tolist():
        log_ratios = (batch.log_probs - batch.old)[i]
        mean = log_ratios[batch.mask[i]].mean()
        value = math.exp(mean if ratio == "sequence" else log_ratios[t])
        advantage = batch.advantages[i].item()
        expected["tokens"] += 1
        expected["ratio"] += value
        expected["clip_low"] += value < 0.8 and advantage < 0
        expected["clip_high"] += value > 1.9 and advantage > 0
        expected["dual_clip"] += value > 1.1 and advantage < 0
    metrics = run(batch, config, batch.log_probs).metrics
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected)
    if ratio == "token":
        assert min(expected.values()) > 0


@pytest.mark.parametrize("keys", CASES, ids=str)
def test_micro_batches_add_up(keys: dict[str, Any]) -> None:
    batch, config = Batch(seed=1), LossConfig(**keys)
    log_probs = leaf(batch.log_probs)
    whole = run(batch, config, log_probs)
    expected = gradient_of(whole.loss, log_probs)
    parts = [run(batch, config, log_probs, rows) for rows in (slice(1), slice(1, 4), slice(4, 5))]
    total = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(total, whole.loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(gradient_of(total, log_probs), expected, rtol=1e-13, atol=1e-15)
    for name, value in whole.metrics.items():
        summed = torch.stack([part.metrics[name] for part in parts]).sum()
        torch.testing.assert_close(summed, value, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths-given", "lengths-counted"])
@pytest.mark.parametrize("keys", CASES, ids=str)
def test_context_slices_add_up(keys: dict[str, Any], lengths: bool) -> None:
    batch, config = Batch(seed=2), LossConfig(**keys)
    log_probs = leaf(batch.log_probs)
    whole = run(batch, config, log_probs)
    expected = gradient_of(whole.loss, log_probs)
    slices = (slice(0, 3), slice(3, 7))
    log_ratio = (batch.log_probs - batch.old) * batch.mask

    def sum_with(other: slice) -> Callable[[Tensor], Tensor]:
        """What an all-reduce of two ranks does, for the counts and for the log-ratios."""

        def total(local: Tensor) -> Tensor:
            assert not local.requires_grad
            values = log_ratio if local.is_floating_point() else batch.mask
            return local + values[:, other].sum(1)

        return total

    parts = [
        run(batch, config, log_probs, slice(None), own, sum_with(other), lengths)
        for own, other in (slices, slices[::-1])
    ]
    total = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient_of(total, log_probs), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("keys", [{}, {"ratio": "sequence"}, {"dual_clip": 1.2}], ids=str)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_masked_positions_may_hold_anything(keys: dict[str, Any], garbage: float) -> None:
    batch, config = Batch(), LossConfig(**keys)
    clean = leaf(batch.log_probs)
    expected = run(batch, config, clean)
    gradient = gradient_of(expected.loss, clean)
    hidden = ~batch.mask
    for values in (batch.log_probs, batch.old, batch.reference):
        values[hidden] = garbage
    dirty = leaf(batch.log_probs)
    with torch.autograd.detect_anomaly(check_nan=True):  # no NaN on the way either
        result = run(batch, config, dirty)
        assert torch.equal(gradient_of(result.loss, dirty), gradient)
    assert torch.equal(result.loss, expected.loss)
    assert (gradient[hidden] == 0).all()
    for name, value in expected.metrics.items():
        assert torch.equal(result.metrics[name], value)


@pytest.mark.parametrize("keys", [{}, {"ratio": "sequence"}], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)], ids=str)
def test_an_empty_mask_gives_a_zero_that_can_be_back_propagated(keys: dict[str, Any], shape: tuple[int, int]) -> None:
    log_probs = torch.full(shape, -math.inf, requires_grad=True)
    mask = torch.zeros(shape)
    weights, advantages = torch.ones(shape), torch.ones(shape[0])
    result = policy_loss(log_probs, None, advantages, mask, weights, LossConfig(**keys), log_probs.detach())
    assert result.loss.item() == 0.0
    assert torch.equal(gradient_of(result.loss, log_probs), torch.zeros(shape))
    assert all(value.item() == 0 for value in result.metrics.values())


def test_on_policy_ratio_is_exactly_one_and_the_gradient_is_the_policy_gradient() -> None:
    batch = Batch()
    log_probs = leaf(batch.log_probs.float())
    weights = token_weights(batch.mask, batch.lengths, batch.denominators, LossConfig())
    result = policy_loss(log_probs, None, batch.advantages, batch.mask, weights, LossConfig(kl="none"))
    assert result.metrics["ratio"].item() == batch.mask.sum().item()
    expected = -weights * batch.advantages.float().unsqueeze(1)
    torch.testing.assert_close(gradient_of(result.loss, log_probs), expected)
    assert result.loss.dtype == torch.float32


def test_a_group_without_signal_feels_only_the_kl() -> None:
    batch = Batch()
    batch.advantages = torch.zeros(5, dtype=torch.float64)
    log_probs = leaf(batch.log_probs)
    silent = run(batch, LossConfig(kl="none"), log_probs).loss
    assert silent.item() == 0.0
    assert (gradient_of(silent, log_probs) == 0).all()
    assert (gradient_of(run(batch, LossConfig(), log_probs).loss, log_probs) != 0).any()


def test_no_gradient_flows_into_old_or_reference() -> None:
    batch = Batch()
    batch.old, batch.reference = leaf(batch.old), leaf(batch.reference)
    log_probs = leaf(batch.log_probs)
    run(batch, LossConfig(), log_probs).loss.backward()
    assert batch.old.grad is None and batch.reference.grad is None
    assert log_probs.grad is not None and (log_probs.grad != 0).any()


def test_a_needed_reference_is_demanded() -> None:
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="reference"):
        policy_loss(zeros, None, torch.ones(1), torch.ones(1, 1), zeros, LossConfig())
    result = policy_loss(zeros, None, torch.ones(1), torch.ones(1, 1), zeros, LossConfig(kl_coefficient=0.0))
    assert "kl_k3" not in result.metrics
