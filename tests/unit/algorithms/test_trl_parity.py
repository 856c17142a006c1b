"""Our policy loss against TRL's own code: `GRPOTrainer._compute_loss`, written against trl 1.16.0.

TRL's method runs as it is, on a stand-in trainer that only supplies the attributes it reads and the
log-probs a model would give. TRL works on one process with `gradient_accumulation_steps = 1`
wherever its own denominators are those of a micro-batch ("bnpo", "dr_grpo" and "grpo" average over
what they see); "dapo" takes the global token count, and is also compared over two micro-batches.

Known differences, which the tests step around:
1. `delta` (two-sided clipping) caps the ratio inside the first branch of the min, for either sign
   of the advantage; our dual_clip caps the loss at dual_clip |A| for A < 0. Both are the same
   function where delta >= 1 + epsilon_high, as TRL's documentation asks. Below that TRL's cap binds
   positive advantages too and lets negative ones reach 1 + epsilon_high: not compared.
2. `use_bias_correction_kl` multiplies the KL term by the ratio (DeepSeek-V3.2); it is TRL's default
   and not the paper's objective, so it is off here.
3. TRL's advantages use the sample standard deviation and epsilon 1e-4; the paper states neither,
   and our default is the population's with 1e-6. With those two keys set, they agree.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd

from megatron_r1.algorithms.advantage import group_advantages
from megatron_r1.algorithms.policy_loss import policy_loss
from megatron_r1.algorithms.weights import Denominators, token_weights
from megatron_r1.config.grpo import AdvantageConfig, LossConfig

MAX_COMPLETION_LENGTH = 13


def inputs(seed: int) -> dict[str, Tensor]:
    """Six completions of up to nine tokens, the last one empty, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_probs = -normal(6, 9).abs() - 0.1
    lengths = torch.tensor([9, 4, 1, 7, 6, 0])
    return {
        "log_probs": log_probs,
        "old": log_probs + 0.6 * normal(6, 9),
        "reference": log_probs + 0.6 * normal(6, 9),
        "advantages": torch.tensor([1.2, -0.8, 0.5, -1.7, 0.0, 0.9], dtype=torch.float64),
        "mask": (torch.arange(9) < lengths.unsqueeze(1)).long(),
    }


def trl_trainer(log_probs: Tensor, accumulation: int, **keys: Any) -> SimpleNamespace:
    """What `_compute_loss` reads of a trainer, with everything it can switch off switched off."""
    settings: dict[str, Any] = {
        "loss_type": "grpo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "delta": None,
        "beta": 0.0,
        "importance_sampling_level": "token",
        **keys,
    }
    args = SimpleNamespace(delta=settings.pop("delta"), use_bias_correction_kl=False, steps_per_generation=accumulation)
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda tensor: tensor, reduce=lambda tensor, reduction: tensor
    )
    return SimpleNamespace(
        args=args,
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        max_completion_length=MAX_COMPLETION_LENGTH,
        current_gradient_accumulation_steps=accumulation,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            log_probs,
            torch.zeros_like(log_probs),
            None,
        ),
        **settings,
    )


def trl_loss(
    data: dict[str, Tensor], log_probs: Tensor, rows: slice, accumulation: int, **keys: Any
) -> tuple[Tensor, dict[str, list[float]]]:
    """TRL's loss of some rows, and the metrics it logged."""
    trainer = trl_trainer(log_probs[rows], accumulation, **keys)
    prompt = torch.zeros(data["mask"][rows].shape[0], 1, dtype=torch.long)
    loss = GRPOTrainer._compute_loss(
        trainer,
        None,
        {
            "prompt_ids": prompt,
            "prompt_mask": prompt + 1,
            "completion_ids": torch.zeros_like(data["mask"][rows]),
            "completion_mask": data["mask"][rows],
            "advantages": data["advantages"][rows],
            "old_per_token_logps": data["old"][rows],
            "ref_per_token_logps": data["reference"][rows],
            "num_items_in_batch": data["mask"].sum(),
        },
    )
    return loss, trainer._metrics["train"]


def our_loss(data: dict[str, Tensor], log_probs: Tensor, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Our loss of the whole batch, and its metrics."""
    lengths = data["mask"].sum(1)
    everything = Denominators(sequences=len(lengths), tokens=int(lengths.sum()))
    weights = token_weights(data["mask"], lengths, everything, config, MAX_COMPLETION_LENGTH, dtype=torch.float64)
    result = policy_loss(
        log_probs,
        data["old"],
        data["advantages"],
        data["mask"],
        weights,
        config,
        reference_log_probs_BT=data["reference"],
        response_lengths_B=lengths,
    )
    return result.loss, result.metrics


def assert_same(data: dict[str, Tensor], ours: Tensor, theirs: Tensor, log_probs: Tensor) -> None:
    """Loss value and gradient by log-probs agree to float64 rounding."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    (our_gradient,) = torch.autograd.grad(ours, log_probs)
    (their_gradient,) = torch.autograd.grad(theirs, log_probs)
    assert (our_gradient != 0).any()
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-12, atol=1e-14)


NO_KL: dict[str, Any] = {"kl": "none", "clip_low": 0.2}
PAIRS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"loss_type": "grpo"}, {**NO_KL}),
    ({"loss_type": "bnpo"}, {**NO_KL, "aggregation": "token-mean"}),
    ({"loss_type": "dapo"}, {**NO_KL, "aggregation": "token-mean"}),
    ({"loss_type": "dr_grpo"}, {**NO_KL, "aggregation": "constant"}),
    ({"epsilon_high": 0.28}, {**NO_KL, "clip_high": 0.28}),
    ({"epsilon_low": 0.05, "epsilon_high": 0.4}, {**NO_KL, "clip_low": 0.05, "clip_high": 0.4}),
    ({"delta": 1.2}, {**NO_KL, "dual_clip": 1.2}),  # delta = 1 + epsilon_high, the lowest defined
    ({"delta": 1.5, "loss_type": "dapo"}, {**NO_KL, "dual_clip": 1.5, "aggregation": "token-mean"}),
    (
        {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.05},
        {**NO_KL, "ratio": "sequence", "clip_low": 0.1, "clip_high": 0.05},
    ),
    (
        {"importance_sampling_level": "sequence", "delta": 1.3, "beta": 0.1},
        {"clip_low": 0.2, "ratio": "sequence", "dual_clip": 1.3, "kl_coefficient": 0.1},
    ),
    ({"beta": 0.04}, {"clip_low": 0.2, "kl_coefficient": 0.04}),
    (
        {"beta": 0.5, "loss_type": "dr_grpo"},
        {"clip_low": 0.2, "kl_coefficient": 0.5, "aggregation": "constant"},
    ),
    # The paper's objective, all defaults of ours.
    ({"epsilon_low": 10.0, "epsilon_high": 10.0, "beta": 0.001}, {}),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=lambda keys: str(keys))
def test_loss_and_gradient(theirs: dict[str, Any], ours: dict[str, Any], seed: int) -> None:
    data = inputs(seed)
    log_probs = data["log_probs"].clone().requires_grad_()
    their_loss, _ = trl_loss(data, log_probs, slice(None), 1, **theirs)
    our_value, _ = our_loss(data, log_probs, LossConfig(**ours))
    assert_same(data, our_value, their_loss, log_probs)


def test_global_token_mean_over_micro_batches() -> None:
    """TRL's "dapo" over two micro-batches of one accumulation window."""
    data = inputs(2)
    log_probs = data["log_probs"].clone().requires_grad_()
    # Each call scales by steps_per_generation / accumulation = 1; the window is the whole batch.
    parts = [trl_loss(data, log_probs, rows, 2, loss_type="dapo", beta=0.1)[0] for rows in (slice(0, 2), slice(2, 6))]
    config = LossConfig(clip_low=0.2, aggregation="token-mean", kl_coefficient=0.1)
    ours, _ = our_loss(data, log_probs, config)
    assert_same(data, ours, parts[0] + parts[1], log_probs)


def test_metrics() -> None:
    """Clip shares and KL are TRL's, once our sums are divided by our tokens."""
    data = inputs(0)
    _, theirs = trl_loss(data, data["log_probs"], slice(None), 1, epsilon_high=0.28, beta=0.1)
    config = LossConfig(clip_low=0.2, clip_high=0.28, kl_coefficient=0.1)
    _, ours = our_loss(data, data["log_probs"], config)
    for mine, yours in {
        "clip_low": "clip_ratio/low_mean",
        "clip_high": "clip_ratio/high_mean",
        "kl_k3": "kl",
    }.items():
        value = (ours[mine] / ours["tokens"]).item()
        assert value > 0
        assert value == pytest.approx(theirs[yours][0], rel=1e-6), mine


def test_advantages() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 1.0, 0.25], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (nanstd(rewards) + 1e-4)
    ours = group_advantages(rewards, AdvantageConfig(std="sample", epsilon=1e-4))
    torch.testing.assert_close(ours, expected.float())
