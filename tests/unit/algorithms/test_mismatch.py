"""Mismatch weights and metrics: values worked out by hand, a slow reference, and the split over context ranks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_r1.algorithms.mismatch import MAXIMA, SUMS, Correction, correct, mismatch_metrics
from megatron_r1.algorithms.policy_loss import policy_loss
from megatron_r1.algorithms.weights import Denominators, token_weights
from megatron_r1.config.grpo import CorrectionConfig, LossConfig, MismatchLimit
from megatron_r1.observe.names import METRICS

NAN = math.nan
# w of three sequences; the third is empty. Products 0.8 and 6; geometric means 0.8 ** (1/3) and 6 ** (1/2).
W = [[4.0, 0.25, 0.8], [1.5, 4.0, NAN], [NAN, NAN, NAN]]
MASK = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
LENGTHS = torch.tensor([3, 2, 0])
ADVANTAGES = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
GEO = (0.8 ** (1 / 3), 6**0.5)  # 0.928318, 2.449490


def log_probs() -> tuple[Tensor, Tensor]:
    """(trainer, rollout) whose ratio is W; NaN where nothing is learned."""
    rollout = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -0.1, -7.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    return rollout + torch.tensor(W, dtype=torch.float64).log(), rollout


def run(limits: tuple[MismatchLimit, ...] = (), policy: Tensor | None = None, **config: Any) -> Correction:
    trainer, rollout = log_probs()
    return correct(
        trainer,
        rollout,
        MASK,
        LENGTHS,
        ADVANTAGES,
        CorrectionConfig(**config),
        limits,
        policy_log_probs_NL=policy,
    )


def values(result: Correction) -> tuple[dict[str, float], dict[str, float]]:
    sums, maxima = result.sums, result.maxima
    assert (tuple(sums), tuple(maxima)) == (SUMS, MAXIMA)
    return {k: float(v) for k, v in sums.items()}, {k: float(v) for k, v in maxima.items()}


def weights_of(result: Correction) -> Tensor:
    assert result.weights_NL is not None
    return result.weights_NL


def metrics(result: Correction) -> dict[str, float]:
    return mismatch_metrics(*values(result))


@pytest.mark.parametrize(
    ("config", "first", "second"),
    [
        (dict(method="tis"), [2.0, 0.25, 0.8], [1.5, 2.0]),
        (dict(method="tis", high=3.0), [3.0, 0.25, 0.8], [1.5, 3.0]),
        (dict(method="mis"), [0.0, 0.0, 0.8], [1.5, 0.0]),
        (dict(method="cis"), [2.0, 0.5, 0.8], [1.5, 2.0]),
        (dict(method="icepop"), [4.0, 0.0, 0.8], [1.5, 4.0]),
        (dict(method="icepop", low=0.2, high=3.9), [0.0, 0.25, 0.8], [1.5, 0.0]),
        (dict(method="tis", level="sequence"), [0.8] * 3, [2.0] * 2),
        (dict(method="mis", level="sequence"), [0.8] * 3, [0.0] * 2),
        (dict(method="cis", level="sequence", low=0.9, high=7.0), [0.9] * 3, [6.0] * 2),
        (dict(method="icepop", level="sequence"), [0.8] * 3, [0.0] * 2),
        (dict(method="icepop", level="sequence", high=6.1), [0.8] * 3, [6.0] * 2),
        (dict(method="tis", level="geometric"), [GEO[0]] * 3, [1.0001] * 2),
        (dict(method="tis", level="geometric", high=2.5), [GEO[0]] * 3, [GEO[1]] * 2),
        (dict(method="mis", level="geometric", low=0.9, high=1.1), [GEO[0]] * 3, [0.0] * 2),
        (dict(method="cis", level="geometric"), [0.9999] * 3, [1.0001] * 2),
        (dict(method="icepop", level="geometric"), [0.0] * 3, [0.0] * 2),
    ],
)
def test_each_method_at_each_level(config: dict[str, Any], first: list[float], second: list[float]) -> None:
    result = run(**config)
    expected = torch.tensor([first, [*second, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(result.weights_NL, expected, rtol=1e-12, atol=0)
    found = metrics(result)
    assert found["policy/correction_weight"] == pytest.approx(sum(first + second) / 5, rel=1e-12)
    assert found["policy/correction_masked"] == (first + second).count(0.0) / 5
    assert found["policy/correction_vetoed"] == 0


def test_the_measured_quantities_by_hand() -> None:
    result = run()
    assert result.weights_NL is None
    w = [4.0, 0.25, 0.8, 1.5, 4.0]
    assert metrics(result) == pytest.approx(
        {
            "policy/engine_gap": (3 * math.log(4) + math.log(1.25) + math.log(1.5)) / 5,
            "policy/engine_k3": (sum(w) - 5 - math.log(0.8 * 6)) / 5,
            "policy/engine_ratio_max": 4.0,
            "policy/engine_ess": 10.55**2 / (5 * 34.9525),
            "policy/engine_outliers": 3 / 5,
        },
        rel=1e-12,
    )


def test_effective_sample_size() -> None:
    sums = dict.fromkeys(SUMS, 0.0) | {"mismatch_tokens": 4.0}

    def ess(*w: float) -> float:
        given = sums | {"mismatch_weight": sum(w), "mismatch_weight_squared": sum(x * x for x in w)}
        return mismatch_metrics(given, {"mismatch_ratio_max": 1.0})["policy/engine_ess"]

    assert ess(1, 1, 1, 1) == 1
    assert ess(3, 3, 3, 3) == 1
    assert ess(1, 0, 0, 0) == 1 / 4
    assert ess(3, 1, 1, 1) == 36 / 48


def test_largest_ratio_looks_both_ways() -> None:
    trainer, rollout = log_probs()
    turned = correct(rollout, trainer, MASK, LENGTHS, ADVANTAGES, CorrectionConfig())
    assert float(turned.maxima["mismatch_ratio_max"]) == pytest.approx(4)
    trainer[0, 1] = rollout[0, 1] - math.log(9)
    one_way = correct(trainer, rollout, MASK, LENGTHS, ADVANTAGES, CorrectionConfig())
    assert float(one_way.maxima["mismatch_ratio_max"]) == pytest.approx(9)


@pytest.mark.parametrize(("veto", "kept"), [(0.3, [False, True]), (0.2, [True, True]), (0.25 - 1e-9, [True, True])])
def test_veto_takes_the_whole_sequence(veto: float, kept: list[bool]) -> None:
    result = run(veto=veto)
    expected = torch.tensor([[kept[0]] * 3, [kept[1], kept[1], False], [False] * 3], dtype=torch.float64)
    assert torch.equal(weights_of(result), expected)
    found = metrics(result)
    assert found["policy/correction_vetoed"] == pytest.approx((2 - sum(kept)) / 2)  # the empty one does not count
    assert found["policy/correction_masked"] == (3 * (1 - kept[0]) + 2 * (1 - kept[1])) / 5
    both = weights_of(run(veto=veto, method="tis"))
    assert both[0].any() == kept[0] and both[1, 1] == 2


@pytest.mark.parametrize(
    ("metric", "of_first", "of_second"),
    [
        ("policy/engine_gap", (2 * math.log(4) + math.log(1.25)) / 3, (math.log(4) + math.log(1.5)) / 2),
        ("policy/engine_k3", (5.05 - 3 - math.log(0.8)) / 3, (5.5 - 2 - math.log(6)) / 2),
        ("policy/engine_ratio_max", 4.0, 4.0),
    ],
)
def test_a_limit_that_masks_looks_at_each_sequence(metric: Any, of_first: float, of_second: float) -> None:
    def kept(above: float) -> list[bool]:
        weights = weights_of(run((MismatchLimit(metric=metric, above=above, action="mask"),)))
        return [bool(row.any()) for row in weights[:2]]

    low, high = sorted((of_first, of_second))
    assert kept(high + 1e-9) == [True, True]
    assert kept(low - 1e-9) == [False, False]
    if low < high:
        assert kept((low + high) / 2) == [of_first == low, of_second == low]


def test_limits_that_warn_or_stop_change_nothing() -> None:
    limits = tuple(MismatchLimit(metric="policy/engine_gap", above=0.0, action=action) for action in ("warn", "stop"))
    assert run(limits).weights_NL is None


def test_off_policy_mask_needs_a_negative_advantage_and_drift_of_the_policy_in_training() -> None:
    _, rollout = log_probs()
    policy = rollout - torch.tensor([[0.5, 0.5, 0.5], [0.1, 0.5, NAN], [NAN] * 3], dtype=torch.float64)

    def rows(delta: float, policy: Tensor | None) -> list[bool]:
        weights = weights_of(run(off_policy_mask=delta, policy=policy))
        return [bool(row.any()) for row in weights[:2]]

    assert rows(0.29, policy) == [True, False]  # the second drifted by 0.3; the first by 0.5, at advantage +1
    assert rows(0.31, policy) == [True, True]
    assert rows(0.31, rollout + (rollout - policy)) == [True, True]  # towards the policy is no drift
    assert rows(0.01, None) == [True, True]  # the trainer's side: mean log(1 / w) = -log(6) / 2


def test_whatever_stands_outside_the_mask_is_harmless_and_empty_masks_count_nothing() -> None:
    trainer, rollout = log_probs()
    clean = torch.where(MASK, trainer, -1.0)
    config = CorrectionConfig(method="cis", level="geometric", low=0.1, high=9.0, veto=1e-4)
    for fill in (NAN, math.inf, -math.inf):
        dirty = torch.where(MASK, rollout, fill)
        a = correct(trainer, dirty, MASK, LENGTHS, ADVANTAGES, config)
        b = correct(clean, rollout, MASK, LENGTHS, ADVANTAGES, config)
        assert torch.equal(weights_of(a), weights_of(b))
        assert values(a) == values(b)
    for empty in (MASK[:, :0], torch.zeros_like(MASK), MASK[:0]):
        n, length = empty.shape
        result = correct(trainer[:n, :length], rollout[:n, :length], empty, LENGTHS[:n] * 0, ADVANTAGES[:n], config)
        sums, maxima = values(result)
        assert sums == dict.fromkeys(SUMS, 0.0)
        assert maxima == {"mismatch_ratio_max": 1.0}
        assert mismatch_metrics(sums, maxima) == {}
        assert weights_of(result).shape == empty.shape and not weights_of(result).any()


def test_log_ratios_are_clamped_at_20_before_exp_only() -> None:
    trainer, rollout = torch.zeros(1, 2), torch.tensor([[-500.0, -40.0]])
    given = (torch.ones(1, 2), torch.tensor([2]), torch.ones(1))
    sums, maxima = values(correct(trainer, rollout, *given, CorrectionConfig()))
    assert sums["mismatch_abs"] == 540
    assert sums["mismatch_weight"] == pytest.approx(2 * math.exp(20), rel=1e-6)
    assert sums["mismatch_weight_squared"] == pytest.approx(2 * math.exp(40), rel=1e-6)
    assert sums["mismatch_k3"] == pytest.approx(2 * (math.exp(20) - 1) - 540, rel=1e-6)
    assert maxima["mismatch_ratio_max"] == pytest.approx(math.exp(20), rel=1e-6)
    # a sum over the response is clamped as a whole: -30 + 25 = -5, not -20 + 20
    config = CorrectionConfig(method="icepop", level="sequence", low=1e-3)
    result = correct(torch.tensor([[-30.0, 25.0]]), torch.zeros(1, 2), *given, config)
    assert weights_of(result).tolist() == [[pytest.approx(math.exp(-5))] * 2]


def test_a_broken_log_prob_within_the_mask_shows() -> None:
    for broken in (NAN, -math.inf):
        trainer, rollout = log_probs()
        rollout[0, 0] = broken
        sums, _ = values(correct(trainer, rollout, MASK, LENGTHS, ADVANTAGES, CorrectionConfig()))
        assert not math.isfinite(sums["mismatch_abs"]) and not math.isfinite(sums["mismatch_k3"])


def test_small_differences_keep_their_digits_in_float32() -> None:
    trainer = torch.full((1, 1000), 1e-4)
    ones = torch.ones(1, 1000)
    sums, _ = values(
        correct(trainer, torch.zeros(1, 1000), ones, torch.tensor([1000]), torch.ones(1), CorrectionConfig())
    )
    assert sums["mismatch_k3"] / 1000 == pytest.approx(5e-9, rel=1e-4)
    assert sums["mismatch_weight"] ** 2 / (1000 * sums["mismatch_weight_squared"]) == pytest.approx(1, abs=1e-12)
    weights = weights_of(
        correct(trainer, trainer, ones, torch.tensor([1000]), torch.ones(1), CorrectionConfig(veto=0.1))
    )
    assert weights.dtype == torch.float32


ALL = (
    MismatchLimit(metric="policy/engine_gap", above=0.45, action="mask"),
    MismatchLimit(metric="policy/engine_k3", above=0.2, action="mask"),
    MismatchLimit(metric="policy/engine_ratio_max", above=3.3, action="mask"),
)


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        (dict(method="mis"), ()),
        (dict(method="cis", level="sequence", low=0.1, high=8.0), ()),
        (dict(method="mis", level="geometric", low=0.9, high=1.1), ()),
        (dict(method="tis", veto=0.35), ()),
        (dict(off_policy_mask=0.05), ()),
        (dict(), ALL[:1]),
        (dict(), ALL[1:2]),
        (dict(), ALL[2:]),
    ],
)
def test_two_context_ranks_equal_the_whole(config: dict[str, Any], limits: tuple[MismatchLimit, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    trainer = -torch.rand(12, 9, generator=generator, dtype=torch.float64)
    rollout = trainer + 0.5 * torch.randn(12, 9, generator=generator, dtype=torch.float64)
    policy = trainer + 0.1 * torch.randn(12, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(12, 9, generator=generator) < 0.8
    mask[3] = False
    here = torch.rand(12, 9, generator=generator) < 0.5
    here[4] = True  # the other rank holds nothing of this one
    advantages = torch.randn(12, generator=generator, dtype=torch.float64)
    settings = CorrectionConfig(**config)

    def side(part: Tensor, add: Callable[[Tensor], Tensor], largest: Callable[[Tensor], Tensor]) -> Correction:
        return correct(
            trainer,
            rollout,
            mask & part,
            mask.sum(1),
            advantages,
            settings,
            limits,
            policy_log_probs_NL=policy,
            sum_over_context=add,
            max_over_context=largest,
        )

    whole = side(torch.ones_like(mask), lambda x: x, lambda x: x)
    halves = _two_ranks([here, ~here], side)
    expected = weights_of(whole)
    weights = weights_of(halves[0]) + weights_of(halves[1])
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-15)
    if config.get("level") is None and config.get("method") != "mis":  # the case tells sequences apart
        assert 1 < int((expected.sum(1) == 0).sum()) < 12
    sums, maxima = values(whole)
    split = [values(half) for half in halves]
    assert {k: split[0][0][k] + split[1][0][k] for k in sums} == pytest.approx(sums, rel=1e-12)
    assert max(split[0][1]["mismatch_ratio_max"], split[1][1]["mismatch_ratio_max"]) == maxima["mismatch_ratio_max"]
    assert sums["correction_sequences"] == pytest.approx(11)


def _two_ranks(parts: list[Tensor], side: Callable[..., Correction]) -> list[Correction]:
    """Each part in a thread of its own; a collective waits for the other's, or fails after five seconds."""
    barrier = threading.Barrier(2, timeout=5)
    offered: dict[int, Tensor] = {}

    def collective(rank: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(tensor: Tensor) -> Tensor:
            offered[rank] = tensor
            barrier.wait()
            result = combine(offered[0], offered[1])
            barrier.wait()
            return result

        return call

    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(side, part, collective(rank, torch.add), collective(rank, torch.maximum))
            for rank, part in enumerate(parts)
        ]
        return [job.result() for job in jobs]


def loss_of(correction: Tensor | None, log_probs_BT: Tensor, kl: float, advantages: Tensor = ADVANTAGES) -> Any:
    config = LossConfig(kl_coefficient=kl, clip_low=0.2)
    weights = token_weights(MASK, LENGTHS, Denominators(3, 5), config, dtype=torch.float64)
    _, old = log_probs()
    reference = old - 0.3
    return policy_loss(log_probs_BT, old, advantages, MASK, weights, config, reference, correction_NL=correction)


def test_the_loss_multiplies_the_policy_gradient_and_not_the_kl() -> None:
    _, old = log_probs()
    now = (old + 0.1).requires_grad_()
    weights = weights_of(run(method="mis"))
    plain, kl_only = loss_of(None, now, 0.5), loss_of(None, now, 0.5, ADVANTAGES * 0)
    corrected, nothing = loss_of(weights, now, 0.5), loss_of(torch.zeros_like(weights), now, 0.5)
    assert nothing.loss.item() == pytest.approx(kl_only.loss.item(), rel=1e-12)
    # by hand: ratio e^0.1, 1 / (3 |o_i|); weights [0, 0, 0.8] at A = 1 and [1.5, 0] at A = -1
    policy_part = -math.exp(0.1) * (0.8 / 9 - 1.5 / 6)
    assert corrected.loss.item() == pytest.approx(policy_part + kl_only.loss.item(), rel=1e-12)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, now, retain_graph=True)[0]

    policy_gradient = gradient(plain.loss) - gradient(kl_only.loss)
    torch.testing.assert_close(gradient(corrected.loss), gradient(kl_only.loss) + weights * policy_gradient)
    assert {k: float(v) for k, v in corrected.metrics.items()} == {k: float(v) for k, v in plain.metrics.items()}


def test_weights_of_one_and_none_at_all_give_the_same_bits() -> None:
    _, old = log_probs()
    now = (old + 0.1 * torch.randn(3, 3, generator=torch.Generator().manual_seed(1))).double().requires_grad_()
    a, b = loss_of(None, now, 0.1).loss, loss_of(torch.ones_like(now), now, 0.1).loss
    assert torch.equal(a, b)
    assert torch.equal(torch.autograd.grad(a, now)[0], torch.autograd.grad(b, now)[0])


def test_weights_are_constants_to_the_gradient() -> None:
    _, old = log_probs()
    now = (old + 0.1).requires_grad_()
    result = correct(now, old, MASK, LENGTHS, ADVANTAGES, CorrectionConfig(method="tis", high=9.0))
    assert not weights_of(result).requires_grad
    assert not any(x.requires_grad for x in (*result.sums.values(), *result.maxima.values()))
    # a weight with a graph of its own, NaN outside the mask: its gradient is not taken
    attached = torch.where(MASK, (now - old).exp(), NAN)
    a = torch.autograd.grad(loss_of(attached, now, 0.1).loss, now)[0]
    b = torch.autograd.grad(loss_of(weights_of(result), now, 0.1).loss, now)[0]
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert torch.isfinite(a[MASK]).all() and not a[~MASK].any()


def test_every_metric_is_listed() -> None:
    assert metrics(run(method="tis")).keys() <= METRICS.keys()
