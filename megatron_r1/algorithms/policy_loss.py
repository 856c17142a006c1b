"""The policy loss of the GRPO family: inside the training step, after the policy's forward.

It returns weighted sums, never means: `weights.token_weights` carries the denominators, so the
losses of micro-batches and ranks simply add up.

Letters: B sequences, T positions; every [B, T] argument is aligned: entry (b, t) speaks of the same
predicted token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_r1.algorithms.kl import KlKind, kl_estimate
from megatron_r1.config.grpo import LossConfig

KL_METRICS: tuple[KlKind, ...] = ("k1", "k3")


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The loss of one micro-batch and what there is to say of it.

    `metrics` are detached scalar SUMS over learned tokens, to be divided by the (summed) "tokens":
    - "tokens": how many there are
    - "ratio": probability ratio (with ratio = "sequence" the sequence's, once for each token)
    - "clip_low", "clip_high": tokens whose gradient the clip removed (A < 0 below, A > 0 above)
    - "dual_clip": tokens whose loss the dual clip bounds
    - "kl_k1", "kl_k3": these estimates of KL(policy || reference), whatever estimator the loss uses;
      present exactly when reference log-probs were given
    """

    loss: Tensor  # scalar to minimise, weights applied, differentiable
    metrics: dict[str, Tensor]


def identity(tensor: Tensor) -> Tensor:
    """The sum over a context that is not split."""
    return tensor


def policy_loss(
    log_probs_BT: Tensor,
    old_log_probs_BT: Tensor | None,
    advantages_B: Tensor,
    loss_mask_BT: Tensor,
    weights_BT: Tensor,
    config: LossConfig,
    reference_log_probs_BT: Tensor | None = None,
    response_lengths_B: Tensor | None = None,
    sum_over_context: Callable[[Tensor], Tensor] = identity,
    correction_NL: Tensor | None = None,
) -> PolicyLoss:
    """-sum_it w_it { min[rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i] - beta KL_it }.

    Source: DeepSeek-R1 (arXiv 2501.12948) eq. 1-3 in the per-token form of DeepSeekMath (arXiv
    2402.03300) eq. 3. Departures, each behind a key: clip_high (DAPO, arXiv 2503.14476), ratio =
    "sequence" (GSPO, arXiv 2507.18071), dual_clip (arXiv 1912.09729: for A < 0 the token's loss is
    at most dual_clip |A|), kl = "k1" / "k2".

    Neither ratio nor KL is clamped: a log-ratio beyond 88 overflows float32 and is for the caller's
    finite check to report. Masked positions may hold anything, NaN and infinity included; they add
    nothing to loss or gradient. With an empty mask the loss is exactly 0 and can still be
    back-propagated.

    Args:
        log_probs_BT: [B, T] natural log-probs under the policy being trained, float32 or float64,
            differentiable.
        old_log_probs_BT: [B, T] under the policy that sampled; None: on-policy, ratio exactly 1.
        advantages_B: [B] one advantage a sequence.
        loss_mask_BT: [B, T] bool, integer or float, non-zero where a token is learned.
        weights_BT: [B, T] of `weights.token_weights`, constant within a sequence.
        config: clips, ratio, KL.
        reference_log_probs_BT: [B, T] under the KL reference; required when config.needs_reference,
            else only logged.
        response_lengths_B: [B] learned tokens of each FULL sequence, read with ratio = "sequence";
            None: counted from the mask, summed over the context.
        sum_over_context: adds a [B] tensor up over context-parallel ranks; needs no gradient of its
            own. Called only with ratio = "sequence".
        correction_NL: [B, T] weights of `mismatch.correct` that multiply c_it = min[...] and not the
            KL term; read as a constant. None: 1. The metrics are those of the uncorrected ratio.

    Raises:
        ValueError: config.needs_reference without reference log-probs.
    """
    mask = loss_mask_BT.bool()
    log_probs = _learned(log_probs_BT, mask)
    old = log_probs if old_log_probs_BT is None else _learned(old_log_probs_BT, mask)
    log_ratio = log_probs - old.detach()
    ratio = log_ratio.exp()
    if config.ratio == "sequence":
        ratio = _sequence_ratio(log_ratio, mask, response_lengths_B, sum_over_context)
    advantages = advantages_B.to(log_probs.dtype).unsqueeze(1)
    per_token = _clipped_loss(ratio, advantages, config)
    if correction_NL is not None:
        per_token = per_token * correction_NL.detach()
    metrics = _ratio_metrics(ratio.detach(), advantages, mask, config)
    if reference_log_probs_BT is not None:
        reference = _learned(reference_log_probs_BT, mask).detach()
        for kind in KL_METRICS:
            metrics[f"kl_{kind}"] = _masked_sum(kl_estimate(log_probs.detach(), reference, kind), mask)
        if config.kl != "none" and config.kl_coefficient > 0:
            kl = kl_estimate(log_probs, reference, config.kl)
            per_token = per_token + config.kl_coefficient * kl
    elif config.needs_reference:
        raise ValueError(f"a loss with kl = {config.kl!r} needs reference log-probs, got None")
    return PolicyLoss(loss=_masked_sum(per_token * weights_BT, mask), metrics=metrics)


def _learned(values_BT: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is set, else 0; applied before any exp, whose gradient is NaN."""
    return torch.where(mask, values_BT, torch.zeros_like(values_BT))


def _masked_sum(values_BT: Tensor, mask: Tensor) -> Tensor:
    """Sum over learned tokens; where, not a product, because 0 x inf is NaN."""
    return _learned(values_BT, mask).sum()


def _clipped_loss(ratio: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
    """-min[ratio A, clip(ratio) A], bounded at dual_clip |A| where A < 0."""
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.epsilon_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if config.dual_clip is None:
        return loss
    bounded = torch.minimum(loss, -config.dual_clip * advantages)
    return torch.where(advantages < 0, bounded, loss)


def _sequence_ratio(
    log_ratio: Tensor,
    mask: Tensor,
    response_lengths_B: Tensor | None,
    sum_over_context: Callable[[Tensor], Tensor],
) -> Tensor:
    """GSPO's ratio s_i = exp(mean_t log rho_it) at every token, [B, T], in GSPO-token form.

    That is sg[s_i] rho_it / sg[rho_it]. Its value is s_i. Its gradient at token t is
    s_i grad log pi_t; summed with weights that are constant within the sequence this is
    |o_i| w_i s_i mean_t grad log pi_t, the gradient of the sequence form, and no collective has to
    be differentiated.
    """
    lengths = sum_over_context(mask.sum(1)) if response_lengths_B is None else response_lengths_B
    total = sum_over_context(log_ratio.detach().sum(1))
    sequence_ratio = (total / lengths.clamp(min=1)).exp().unsqueeze(1)
    return sequence_ratio * (log_ratio - log_ratio.detach()).exp()


def _ratio_metrics(ratio: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """Sums over learned tokens, as `PolicyLoss` lists them; everything detached."""
    low = (ratio < 1 - config.clip_low) & (advantages < 0)
    high = (ratio > 1 + config.epsilon_high) & (advantages > 0)
    dual = torch.zeros_like(low)
    if config.dual_clip is not None:
        dual = (ratio > config.dual_clip) & (advantages < 0)
    sums = {
        "tokens": torch.ones_like(ratio),
        "ratio": ratio,
        "clip_low": low.to(ratio.dtype),
        "clip_high": high.to(ratio.dtype),
        "dual_clip": dual.to(ratio.dtype),
    }
    return {name: _masked_sum(values, mask) for name, values in sums.items()}
