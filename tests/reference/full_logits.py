"""The plain path that the log-prob head replaces: all logits at once, then log-probs under tensor parallelism.

The head is compared to it by value, and `benchmarks/logprob_head.py` measures what it saves.

N tokens, H hidden size, V this rank's rows of the padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _LogProbs(torch.autograd.Function):
    """log softmax(logits / temperature) at the targets; entropy of the same distribution, without gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor, vocab: int, temperature: float, group: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        width = logits_NV.shape[-1]
        first = rank * width
        scaled = logits_NV.float() / temperature
        if first + width > vocab:
            scaled[..., max(0, vocab - first) :] = -torch.inf
        peak_N1 = scaled.amax(-1, keepdim=True)
        if size > 1:
            dist.all_reduce(peak_N1, op=dist.ReduceOp.MAX, group=group)
        shifted = scaled.sub_(peak_N1)
        weights = shifted.exp()
        local = targets_N - first
        here = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)
        at_target = shifted.gather(-1, local[..., None])[..., 0].masked_fill(~here, 0.0)
        # Padding has weight 0 and logit -inf: their product must be 0 in the entropy.
        energy = (weights * shifted.masked_fill(weights == 0, 0.0)).sum(-1)
        sums_3N = torch.stack([weights.sum(-1), at_target, energy])
        if size > 1:
            dist.all_reduce(sums_3N, group=group)
        total, at_target, energy = sums_3N
        log_total = total.log()
        ctx.save_for_backward(weights.div_(total[..., None]), local, here)
        ctx.temperature, ctx.dtype = temperature, logits_NV.dtype
        log_probs, entropy = at_target - log_total, log_total - energy / total
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        probs_NV, local, here = ctx.saved_tensors
        grad = probs_NV * -grad_N[..., None]
        grad.scatter_add_(-1, local[..., None], (grad_N * here)[..., None])
        return (grad / ctx.temperature).to(ctx.dtype), None, None, None, None


def full_logits_log_probs(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `token_log_probs` returns, by way of the whole [N, V] logits."""
    log_probs_N, entropy_N = _LogProbs.apply(hidden_NH @ weight_VH.T, targets_N, vocab_size, temperature, group)
    return log_probs_N, entropy_N
