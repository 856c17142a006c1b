"""The mismatch between sampling engine and trainer: measured always, corrected where a recipe says so.

Between the policy's forward and `policy_loss`: the two log-probs of every learned token, taken at the same weights,
give w_t = pi_trainer(o_t) / pi_engine(o_t). It would be 1 if both computed alike; kernels, precision and expert
routing make it differ.

Sources: TIS: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025); MIS,
sequence level, geometric level and veto: Liu et al., "When Speed Kills Stability" (2025), as in slime and verl;
IcePop: Ring-1T (2025); off-policy mask: DeepSeek-V3.2 (2025). We differ from slime in two things: what is masked stays
in every denominator (there it leaves them), and weights are not normalised to a mean of 1 over the batch.

Letters: N sequences, L learned tokens of the longest. A context-parallel rank holds some tokens of each sequence, the
mask being False at the others; whatever belongs to a whole sequence goes through `sum_over_context` (adds an [N]
tensor up over context ranks) and `max_over_context` (its maximum). Nothing here is differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_r1.algorithms.policy_loss import identity
from megatron_r1.config.grpo import CorrectionConfig, MismatchLimit

LOG_RATIO_CLAMP = 20.0
"""Log-ratios are clamped to +-20 before exp, as slime does: e^40, the largest square, is far from overflow."""
OUTLIER = 2.0
"""A token with w above this or below its inverse counts as an outlier."""

SUMS = (
    "mismatch_tokens",  # learned tokens
    "mismatch_abs",  # |log w|, not clamped
    "mismatch_k3",  # w - 1 - log w, whose mean over the engine's samples estimates KL(engine || trainer)
    "mismatch_weight",  # w
    "mismatch_weight_squared",  # w^2
    "mismatch_outliers",  # w > 2 or w < 1/2
    "correction_weight",  # the weights that the loss gets
    "correction_masked",  # weights that are 0
    "correction_sequences",  # sequences, each split over context ranks by its tokens
    "correction_vetoed",  # sequences left out whole, split alike
)
"""What `Correction.sums` holds: to be added up over micro-batches and ranks. The last four are 0 without correction."""
MAXIMA = ("mismatch_ratio_max",)
"""What `Correction.maxima` holds: the largest max(w, 1 / w), >= 1; take the maximum over micro-batches and ranks."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What to multiply the policy-gradient terms by, and what there is to say of the mismatch."""

    weights_NL: Tensor | None  # >= 0, 0 where nothing is learned, dtype of the log-probs; None: not corrected, all 1
    sums: dict[str, Tensor]  # scalars, named as in SUMS
    maxima: dict[str, Tensor]  # scalars, named as in MAXIMA


@torch.no_grad()
def correct(
    trainer_log_probs_NL: Tensor,
    rollout_log_probs_NL: Tensor,
    mask_NL: Tensor,
    learned_N: Tensor,
    advantages_N: Tensor,
    config: CorrectionConfig,
    limits: Sequence[MismatchLimit] = (),
    *,
    policy_log_probs_NL: Tensor | None = None,
    sum_over_context: Callable[[Tensor], Tensor] = identity,
    max_over_context: Callable[[Tensor], Tensor] = identity,
) -> Correction:
    """Measure w and turn it into weights by `config` and by the limits whose action is "mask".

    A token or sequence of weight 0 adds nothing to the policy gradient; it keeps its KL term, and it stays in the
    denominators of the loss and of every metric. Positions outside the mask may hold anything, NaN included. A NaN
    or infinite log-prob inside it shows as a sum that is not finite.

    Args:
        trainer_log_probs_NL: [N, L] natural log-probs by the trainer at the weights that sampled.
        rollout_log_probs_NL: [N, L] by the engine that sampled.
        mask_NL: [N, L] bool, integer or float, non-zero where this rank holds a learned token.
        learned_N: [N] learned tokens of each FULL sequence; 0 in a filler, which counts for nothing.
        advantages_N: [N], read by the off-policy mask.
        config: method, level, bounds, veto, off-policy mask.
        limits: the stage's `mismatch_limit` tables; those that warn or stop are not looked at.
        policy_log_probs_NL: [N, L] by the trainer at the weights in training, read by the off-policy mask;
            None: trainer_log_probs_NL, as in a step that is on-policy.
        sum_over_context, max_over_context: over an [N] tensor, called alike on every context rank.
    """
    mask = mask_NL.bool()
    # float64: in float32 the sums round an effective sample size of 1 to above 1
    log_ratio = _learned((trainer_log_probs_NL - rollout_log_probs_NL).double(), mask)
    sums = _measured(log_ratio, mask)
    largest = torch.cat([log_ratio.abs().flatten(), log_ratio.new_zeros(1)]).max()
    maxima = {"mismatch_ratio_max": _exp(largest)}
    masking = [limit for limit in limits if limit.action == "mask"]
    if not config.is_active and not masking:
        unused = {name: log_ratio.new_zeros(()) for name in SUMS if name.startswith("correction_")}
        return Correction(weights_NL=None, sums={**sums, **unused}, maxima=maxima)

    lengths = learned_N.clamp(min=1)
    left_out = torch.zeros_like(learned_N, dtype=torch.bool)
    if config.veto is not None:
        worst = max_over_context(_largest(-log_ratio, mask))
        left_out = left_out | (worst > -math.log(config.veto))
    if config.off_policy_mask is not None:
        policy = trainer_log_probs_NL if policy_log_probs_NL is None else policy_log_probs_NL
        drift = sum_over_context(_learned(rollout_log_probs_NL - policy, mask).sum(1)) / lengths
        left_out = left_out | ((advantages_N < 0) & (drift > config.off_policy_mask))
    for limit in masking:
        value = _of_sequence(limit.metric, log_ratio, mask, lengths, sum_over_context, max_over_context)
        left_out = left_out | (value > limit.threshold)

    weights = _weights(log_ratio, lengths, config, sum_over_context)
    weights = _learned(weights, mask & ~left_out.unsqueeze(1))
    share = mask.sum(1).double() / lengths  # of the sequence's tokens that are here: over context ranks they add to 1
    sums["correction_weight"] = weights.sum()
    sums["correction_masked"] = (mask & (weights == 0)).sum()
    sums["correction_sequences"] = share.sum()
    sums["correction_vetoed"] = (share * left_out).sum()
    return Correction(weights_NL=weights.to(trainer_log_probs_NL.dtype), sums=sums, maxima=maxima)


def mismatch_metrics(sums: Mapping[str, float], maxima: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a step, by their names in `observe.names`, from SUMS and MAXIMA of the whole global batch.

    Empty without a learned token (an engine that gave no log-probs included); policy/correction_* only with a
    correction. Effective sample size: (sum w)^2 / (n sum w^2), 1 where all w are equal.
    """
    tokens = sums["mismatch_tokens"]
    if tokens == 0:
        return {}
    metrics = {
        "policy/engine_gap": sums["mismatch_abs"] / tokens,
        "policy/engine_k3": sums["mismatch_k3"] / tokens,
        "policy/engine_ratio_max": maxima["mismatch_ratio_max"],
        "policy/engine_ess": sums["mismatch_weight"] ** 2 / (tokens * sums["mismatch_weight_squared"]),
        "policy/engine_outliers": sums["mismatch_outliers"] / tokens,
    }
    if sums["correction_sequences"] > 0:
        metrics["policy/correction_weight"] = sums["correction_weight"] / tokens
        metrics["policy/correction_masked"] = sums["correction_masked"] / tokens
        metrics["policy/correction_vetoed"] = sums["correction_vetoed"] / sums["correction_sequences"]
    return metrics


def _learned(values_NL: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is set, else 0; where, not a product, because 0 x NaN is NaN."""
    return torch.where(mask, values_NL, torch.zeros_like(values_NL))


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()


def _k3(log_ratio: Tensor) -> Tensor:
    """w - 1 - log w; expm1, because the difference is of the size of (log w)^2."""
    return log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).expm1() - log_ratio


def _measured(log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The first six of SUMS."""
    w = _exp(log_ratio)
    return {
        "mismatch_tokens": mask.sum(),
        "mismatch_abs": log_ratio.abs().sum(),
        "mismatch_k3": _k3(log_ratio).sum(),
        "mismatch_weight": _learned(w, mask).sum(),
        "mismatch_weight_squared": _learned(w * w, mask).sum(),
        "mismatch_outliers": (log_ratio.abs() > math.log(OUTLIER)).sum(),
    }


def _weights(
    log_ratio: Tensor, lengths: Tensor, config: CorrectionConfig, sum_over_context: Callable[[Tensor], Tensor]
) -> Tensor:
    """[N, L] weight of every position by method and level, before any sequence is left out."""
    if config.method == "none":
        return torch.ones_like(log_ratio)
    if config.level != "token":
        whole_N = sum_over_context(log_ratio.sum(1))
        if config.level == "geometric":
            whole_N = whole_N / lengths
        log_ratio = whole_N.unsqueeze(1).expand_as(log_ratio)
    w = _exp(log_ratio)
    low, high = config.bounds
    if config.method in ("tis", "cis"):
        return w.clamp(low, high)
    return _learned(w, (w >= low) & (w <= high))


def _of_sequence(
    metric: str,
    log_ratio: Tensor,
    mask: Tensor,
    lengths: Tensor,
    sum_over_context: Callable[[Tensor], Tensor],
    max_over_context: Callable[[Tensor], Tensor],
) -> Tensor:
    """[N] the metric's value for each sequence alone."""
    if metric == "policy/engine_gap":
        return sum_over_context(log_ratio.abs().sum(1)) / lengths
    if metric == "policy/engine_k3":
        return sum_over_context(_k3(log_ratio).sum(1)) / lengths
    return _exp(max_over_context(_largest(log_ratio.abs(), mask)))


def _largest(values_NL: Tensor, mask: Tensor) -> Tensor:
    """[N] largest value at a learned token of each sequence, -inf where there is none (also with L = 0)."""
    values = values_NL.masked_fill(~mask, -math.inf)
    return torch.cat([values, values.new_full((len(values), 1), -math.inf)], dim=1).amax(1)
