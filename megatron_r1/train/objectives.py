"""What a training step minimises: next-token prediction, or the policy loss of GRPO.

An objective runs the model on a micro-batch and turns its output into a sum. Megatron divides the gradient of that
sum by the number of loss tokens of the whole batch (all micro-batches, all replicas); an objective with another
denominator multiplies by that count first, so that its own weights are what remains.

N sequences, L learned tokens of the longest. A context-parallel rank holds some of the tokens of every sequence;
its mask says which, and its sums cover those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_r1.algorithms import mismatch
from megatron_r1.algorithms.policy_loss import policy_loss
from megatron_r1.algorithms.weights import Denominators, token_weights
from megatron_r1.config.grpo import CorrectionConfig, LossConfig, MismatchLimit
from megatron_r1.data.batching import MicroBatch
from megatron_r1.parallel.world import World
from megatron_r1.train.scoring import by_sequence, score_tokens

LossOutput = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""(sum to differentiate, number of loss tokens, sums and maxima for the metrics)."""


class Objective(Protocol):
    """One kind of training step."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the sums that `loss` returns, the same on every rank."""
        ...

    @property
    def maximum_names(self) -> tuple[str, ...]:
        """Names of what `loss` returns to be reduced by maximum, each at least 0."""
        ...

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The output of this pipeline stage for this micro-batch."""
        ...

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> LossOutput:
        """From the last stage's output to sums."""
        ...


@dataclass(frozen=True, slots=True)
class LanguageModelObjective:
    """Mean negative log-likelihood of the learned tokens, plus mtp_loss times that of each look-ahead depth.

    The depths' losses are averaged over depths and divided by the same token count (DeepSeek-V3, arXiv 2412.19437,
    eq. 24-25).
    """

    mtp_loss: float = 0.0
    metric_names: tuple[str, ...] = ("nll", "tokens", "mtp_nll", "mtp_tokens")
    maximum_names: tuple[str, ...] = ()

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Log-probs of the learned tokens on the last stage."""
        return score_tokens(model, batch)

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> LossOutput:
        """Sum of the losses of the learned tokens."""
        scores = by_sequence(output, batch)
        tokens = batch.mask_NL.sum()
        nll, ahead = -scores.log_probs_NL.sum(), -scores.ahead_DNL.sum()
        sums = {
            "nll": nll.detach(),
            "tokens": tokens,
            "mtp_nll": ahead.detach(),
            "mtp_tokens": (batch.ahead_DNL >= 0).sum(),
        }
        total = nll + self.mtp_loss / max(1, len(batch.ahead_DNL)) * ahead
        return total, tokens.to(torch.int), sums


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """The GRPO loss of `algorithms.policy_loss` under global denominators."""

    config: LossConfig
    correction: CorrectionConfig
    limits: Sequence[MismatchLimit]
    denominators: Denominators
    length_constant: int
    temperature: float
    world: World
    mtp_loss: float = 0.0
    metric_names: tuple[str, ...] = (
        "loss",
        "tokens",
        "ratio",
        "clip_low",
        "clip_high",
        "dual_clip",
        "kl_k1",
        "kl_k3",
        "entropy",
        "mtp_nll",
        "mtp_tokens",
        *mismatch.SUMS,
    )
    maximum_names: tuple[str, ...] = mismatch.MAXIMA

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Log-probs and entropies of the response tokens on the last stage."""
        return score_tokens(model, batch, temperature=self.temperature, detach_ahead=True)

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> LossOutput:
        """The weighted sum of the per-token objective, ready for Megatron's division by the token count."""
        scores = by_sequence(output, batch)
        mask = batch.mask_NL
        weights = token_weights(mask, batch.learned_N, self.denominators, self.config, self.length_constant)
        correction = self._correct(scores.log_probs_NL.detach(), batch)
        result = policy_loss(
            scores.log_probs_NL,
            batch.old_log_probs_NL,
            batch.advantages_N,
            mask,
            weights,
            self.config,
            reference_log_probs_BT=batch.reference_log_probs_NL,
            response_lengths_B=batch.learned_N,
            sum_over_context=self.world.sum_over_context,
            correction_NL=correction.weights_NL,
        )
        ahead = -scores.ahead_DNL.sum()
        found = {
            **result.metrics,
            **correction.sums,
            **correction.maxima,
            "loss": result.loss.detach(),
            "entropy": scores.entropy_NL.sum(),
            "mtp_nll": ahead.detach(),
            "mtp_tokens": (batch.ahead_DNL >= 0).sum(),
        }
        nothing = output.new_zeros(())  # without a reference there is no KL, without an engine no mismatch to report
        sums = {name: found.get(name, nothing) for name in (*self.metric_names, *self.maximum_names)}
        total = result.loss * self.denominators.tokens + self.mtp_loss / max(1, len(batch.ahead_DNL)) * ahead
        return total, mask.sum().to(torch.int), sums

    def _correct(self, log_probs_NL: torch.Tensor, batch: MicroBatch) -> mismatch.Correction:
        """The engine's log-probs against the trainer's at the weights that sampled."""
        if batch.rollout_log_probs_NL is None:
            return mismatch.Correction(weights_NL=None, sums={}, maxima={})
        bypass = self.correction.old_policy == "rollout"  # then the old log-probs are the engine's own
        old_NL = None if bypass else batch.old_log_probs_NL
        return mismatch.correct(
            log_probs_NL if old_NL is None else old_NL,  # a phase's first step is on-policy
            batch.rollout_log_probs_NL,
            batch.mask_NL,
            batch.learned_N,
            batch.advantages_N,
            self.correction,
            self.limits,
            policy_log_probs_NL=log_probs_NL,
            sum_over_context=self.world.sum_over_context,
            max_over_context=self.world.max_over_context,
        )
