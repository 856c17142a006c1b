"""Log-probabilities and entropy of tokens when each tensor-parallel rank holds a slice of the vocabulary.

B rows, T tokens, V vocabulary, W = padded V / tensor-parallel size. Entries of the padding are never counted, so
every layout has the same distribution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _LogProbs(torch.autograd.Function):
    """log softmax(logits / temperature) at the targets; entropy of the same distribution, without gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits_BTW: torch.Tensor, targets_BT: torch.Tensor, vocab: int, temperature: float, group: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        width = logits_BTW.shape[-1]
        first = rank * width
        scaled = logits_BTW.float() / temperature
        if first + width > vocab:
            scaled[..., max(0, vocab - first) :] = -torch.inf
        peak_BT1 = scaled.amax(-1, keepdim=True)
        if size > 1:
            dist.all_reduce(peak_BT1, op=dist.ReduceOp.MAX, group=group)
        shifted = scaled.sub_(peak_BT1)
        weights = shifted.exp()
        local = targets_BT - first
        here = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)
        at_target = shifted.gather(-1, local[..., None])[..., 0].masked_fill(~here, 0.0)
        # Padding has weight 0 and logit -inf: their product must be 0 in the entropy.
        energy = (weights * shifted.masked_fill(weights == 0, 0.0)).sum(-1)
        sums_3BT = torch.stack([weights.sum(-1), at_target, energy])
        if size > 1:
            dist.all_reduce(sums_3BT, group=group)
        total, at_target, energy = sums_3BT
        log_total = total.log()
        ctx.save_for_backward(weights.div_(total[..., None]), local, here)
        ctx.temperature, ctx.dtype = temperature, logits_BTW.dtype
        log_probs, entropy = at_target - log_total, log_total - energy / total
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_BT: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        probs_BTW, local, here = ctx.saved_tensors
        grad = probs_BTW * -grad_BT[..., None]
        grad.scatter_add_(-1, local[..., None], (grad_BT * here)[..., None])
        return (grad / ctx.temperature).to(ctx.dtype), None, None, None, None


def log_probs_and_entropy(
    logits_BTW: torch.Tensor,
    targets_BT: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Natural-log probability of each target under softmax(logits / temperature), and the entropy in nats.

    logits_BTW: this tensor-parallel rank's slice, any float dtype; targets_BT: int64 global ids. Returns two float32
    [B, T] tensors, equal on all ranks of `group` (None: one process). Only the log-probs carry gradient.
    """
    log_probs, entropy = _LogProbs.apply(logits_BTW, targets_BT, vocab_size, temperature, group)
    return log_probs, entropy
