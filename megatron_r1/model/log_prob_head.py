"""Log-probs and entropy of given tokens straight from hidden states, without ever holding their logits.

Stands between the last layer of the policy and the losses. The logits of all given tokens exist for one block of the
vocabulary at a time; the backward pass computes each block again: one more matrix product instead of most of the
step's peak memory. Blocks of the vocabulary rather than chunks of tokens, because then the gradient of a weight row is
one product, written once, and not a float32 sum over chunks as large as the weights.

A block gives sums around its own largest logit. Blocks and tensor-parallel ranks are joined in one place, so a call
costs two all-reduces however many blocks it has, and the backward pass none.

N scored tokens, H hidden size, V this rank's rows of the padded vocabulary, R rows of a block, K blocks and one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

BLOCK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""Size of a block's float32 logits, of which the forward pass holds two. A CPU is fastest when they stay near its
caches; a GPU needs products large enough to fill it (not measured)."""

_NEVER = -1e4
"""exp of this is 0 in float32: a block whose largest logit lies further below the common one adds nothing."""


def token_log_probs(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    block_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Natural-log probability of each target under softmax(hidden @ weight^T / temperature), and the entropy in nats.

    hidden_NH: float, whole on every rank of `group`; weight_VH: this rank's rows of the output matrix, equally many on
    every rank; targets_N: int64 global ids below `vocab_size`. Rows of `vocab_size` and beyond pad the vocabulary and
    do not count. Matrix products run in the weight's dtype, everything else in float32. N may be 0; it must be the
    same on every rank of `group`. `block_rows` replaces the block that BLOCK_BYTES allows.

    Returns two float32 [N], equal on all ranks of `group` (None: one process). Only the log-probs carry gradient. The
    gradient of weight_VH is complete. That of hidden_NH is this rank's part: its sum over `group` is the caller's to
    take, as the backward of Megatron's `copy_to_tensor_model_parallel_region` does.
    """
    first = 0 if group is None else group.rank() * weight_VH.shape[0]
    real = min(max(vocab_size - first, 0), weight_VH.shape[0])
    if block_rows is None:
        block_rows = max(1, BLOCK_BYTES[weight_VH.device.type] // (4 * max(1, len(targets_N))))
    blocks = [(start, min(start + block_rows, real)) for start in range(0, real, block_rows)]
    log_probs_N, entropy_N = _TokenLogProbs.apply(
        hidden_NH.to(weight_VH.dtype), weight_VH, targets_N - first, blocks, temperature, group
    )
    return log_probs_N, entropy_N


class _TokenLogProbs(torch.autograd.Function):
    """`token_log_probs` of targets counted from this rank's first row, in blocks of rows [start, end)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_N: torch.Tensor,
        blocks: list[tuple[int, int]],
        temperature: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at_target_N = hidden_NH.new_zeros(len(targets_N), dtype=torch.float32)
        # A rank may hold padding only: what follows counts for nothing, and is all that it has.
        peaks, totals, energies = [at_target_N - torch.inf], [at_target_N], [at_target_N]
        for rows in blocks:
            logits_NR = _block_logits(hidden_NH, weight_VH, rows, temperature)
            index_N1, here_N1 = _in_block(targets_N, rows)
            at_target_N = at_target_N + (logits_NR.gather(-1, index_N1) * here_N1)[:, 0]
            peak_N1 = logits_NR.amax(-1, keepdim=True)
            logits_NR -= peak_N1
            weights_NR = logits_NR.exp()
            peaks.append(peak_N1[:, 0])
            totals.append(weights_NR.sum(-1))
            energies.append(weights_NR.mul_(logits_NR).sum(-1))
            del logits_NR, weights_NR  # else they would lie beside the next block's
        log_probs_N, entropy_N, top_N, total_N = _join(peaks, totals, energies, at_target_N, group)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, top_N, total_N)
        ctx.blocks, ctx.temperature = blocks, temperature
        ctx.mark_non_differentiable(entropy_N)
        return log_probs_N, entropy_N

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_N: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden_NH, weight_VH, targets_N, top_N, total_N = ctx.saved_tensors
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        grad_hidden_NH = torch.zeros_like(hidden_NH, dtype=torch.float32)
        grad_weight_VH = torch.empty_like(weight_VH) if for_weight else None
        # A logit's gradient is (exp(logit - top) - total * onehot) * scale; the narrow factors of the products take
        # the scale.
        scale_N1 = (grad_N / -(ctx.temperature * total_N))[:, None]
        scaled_NH = (hidden_NH * scale_N1).to(hidden_NH.dtype)
        for start, end in ctx.blocks:
            error_NR = _block_logits(hidden_NH, weight_VH, (start, end), ctx.temperature)
            error_NR.sub_(top_N[:, None]).exp_()
            index_N1, here_N1 = _in_block(targets_N, (start, end))
            error_NR.scatter_add_(-1, index_N1, -total_N[:, None] * here_N1)
            error_NR = error_NR.to(weight_VH.dtype)
            if for_hidden:
                grad_hidden_NH += error_NR @ weight_VH[start:end]
            if grad_weight_VH is not None:
                torch.mm(error_NR.T, scaled_NH, out=grad_weight_VH[start:end])
            del error_NR
        if grad_weight_VH is not None:
            grad_weight_VH[ctx.blocks[-1][1] if ctx.blocks else 0 :] = 0
        grad_hidden = grad_hidden_NH.mul_(scale_N1).to(hidden_NH.dtype) if for_hidden else None
        return grad_hidden, grad_weight_VH, None, None, None, None


def _block_logits(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, rows: tuple[int, int], temperature: float
) -> torch.Tensor:
    """[N, R] float32, the caller's to overwrite."""
    logits_NR = (hidden_NH @ weight_VH[slice(*rows)].T).float()
    return logits_NR if temperature == 1 else logits_NR.div_(temperature)


def _in_block(targets_N: torch.Tensor, rows: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the targets in a block, and 1.0 for those that are in it, both [N, 1]; others point anywhere."""
    start, end = rows
    here_N = (targets_N >= start) & (targets_N < end)
    return torch.where(here_N, targets_N - start, 0)[:, None], here_N.float()[:, None]


def _join(
    peaks: list[torch.Tensor],
    totals: list[torch.Tensor],
    energies: list[torch.Tensor],
    at_target_N: torch.Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """From each block's largest logit and its sums around that to those of the whole vocabulary.

    With x a logit less the block's largest: total = sum of exp(x), energy = sum of exp(x) x. `at_target_N`: the
    target's logit on the rank that holds it, 0 elsewhere. Returns log-probs, entropy, largest logit, total, all [N].
    """
    peak_KN, total_KN, energy_KN = torch.stack(peaks), torch.stack(totals), torch.stack(energies)
    top_N = peak_KN.amax(0)
    if group is not None and group.size() > 1:
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=group)
    below_KN = (peak_KN - top_N).clamp_(min=_NEVER)
    factor_KN = below_KN.exp()
    sums_3N = torch.stack(
        [(total_KN * factor_KN).sum(0), ((energy_KN + total_KN * below_KN) * factor_KN).sum(0), at_target_N]
    )
    if group is not None and group.size() > 1:
        dist.all_reduce(sums_3N, group=group)
    total_N, energy_N, at_target_N = sums_3N
    log_total_N = total_N.log()
    return at_target_N - top_N - log_total_N, log_total_N - energy_N / total_N, top_N, total_N
