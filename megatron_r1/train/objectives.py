"""What a training step minimises: next-token prediction, or the policy loss of GRPO.

An objective runs the model on a micro-batch and turns its output into a sum. Megatron divides the gradient of that
sum by the number of loss tokens of the whole batch (all micro-batches, all replicas); an objective with another
denominator multiplies by that count first, so that its own weights are what remains.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_r1.algorithms.policy_loss import policy_loss
from megatron_r1.algorithms.weights import Denominators, token_weights
from megatron_r1.config.grpo import LossConfig
from megatron_r1.data.batching import MicroBatch
from megatron_r1.parallel.vocab import log_probs_and_entropy
from megatron_r1.parallel.world import World

LossOutput = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""(sum to differentiate, number of loss tokens, sums for the metrics)."""


class Objective(Protocol):
    """One kind of training step."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the sums that `loss` returns, the same on every rank."""
        ...

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The output of this pipeline stage for this micro-batch."""
        ...

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> LossOutput:
        """From the last stage's output to sums."""
        ...


@dataclass(frozen=True, slots=True)
class LanguageModelObjective:
    """Mean negative log-likelihood of the learned tokens, plus Megatron's multi-token-prediction loss."""

    metric_names: tuple[str, ...] = ("nll", "tokens")

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """[B, T] per-token losses on the last stage."""
        return model(batch.tokens_BT, batch.positions_BT, None, labels=batch.labels_BT, loss_mask=batch.loss_mask_BT)

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> LossOutput:
        """Sum of the losses where loss_mask is 1."""
        total = torch.where(batch.loss_mask_BT > 0, output, 0.0).sum()
        tokens = batch.loss_mask_BT.sum()
        return total, tokens.to(torch.int), {"nll": total.detach(), "tokens": tokens}


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """The GRPO loss of `algorithms.policy_loss` under global denominators."""

    config: LossConfig
    denominators: Denominators
    length_constant: int
    temperature: float
    vocab_size: int
    world: World
    metric_names: tuple[str, ...] = (
        "loss",
        "tokens",
        "ratio",
        "clip_low",
        "clip_high",
        "dual_clip",
        "kl_k3",
        "log_ratio_abs",
        "entropy",
        "mismatch_abs",
        "mismatch_k3",
    )

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """[B, T, V / TP] logits on the last stage."""
        return model(batch.tokens_BT, batch.positions_BT, None)

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> LossOutput:
        """The weighted sum of the per-token objective, ready for Megatron's division by the token count."""
        log_probs_BT, entropy_BT = log_probs_and_entropy(
            output,
            batch.labels_BT,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            group=self.world.tensor_group,
        )
        mask = batch.loss_mask_BT
        weights = token_weights(mask, batch.response_lengths_B, self.denominators, self.config, self.length_constant)
        result = policy_loss(
            log_probs_BT,
            batch.old_log_probs_BT,
            batch.advantages_B,
            mask,
            weights,
            self.config,
            reference_log_probs_BT=batch.reference_log_probs_BT,
            response_lengths_B=batch.response_lengths_B,
        )
        nothing = output.new_zeros(())  # without a reference there is no KL to report
        sums = {name: result.metrics.get(name, nothing) for name in self.metric_names}
        sums["loss"] = result.loss.detach()
        sums["entropy"] = torch.where(mask > 0, entropy_BT, 0.0).sum()
        sums.update(_mismatch(log_probs_BT.detach(), batch))
        return result.loss * self.denominators.tokens, mask.sum().to(torch.int), sums


def _mismatch(log_probs_BT: torch.Tensor, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Trainer against rollout engine, of tokens that the current policy has not been updated on yet or has."""
    if batch.rollout_log_probs_BT is None:
        zero = log_probs_BT.new_zeros(())
        return {"mismatch_abs": zero, "mismatch_k3": zero}
    trainer = batch.old_log_probs_BT if batch.old_log_probs_BT is not None else log_probs_BT
    delta = torch.where(batch.loss_mask_BT > 0, batch.rollout_log_probs_BT - trainer, 0.0)
    return {"mismatch_abs": delta.abs().sum(), "mismatch_k3": (torch.exp(-delta) - 1 + delta).sum()}
