"""Token weights: how the terms of single tokens add up to the objective.

Denominators are counted once over all samples of an optimizer step, on every rank and micro-batch
alike, before its first forward. Each rank then adds weighted sums, so that any split into
micro-batches, data-parallel ranks or context-parallel slices gives the same loss and gradient.

Letters: B sequences, T positions (or the slice of them that a context-parallel rank holds).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_r1.config.grpo import LossConfig
from megatron_r1.types import Sample


@dataclass(frozen=True, slots=True)
class Denominators:
    """What one optimizer step averages over. Example: Denominators(sequences=512, tokens=18320)."""

    sequences: int  # N, also those without a learned token
    tokens: int  # sum over sequences of |o_i|, the learned tokens


def learned_tokens(sample: Sample) -> int:
    """|o_i|: the tokens of a sample that the loss sees. Without a mask these are its response.

    The first token of a sequence is predicted from nothing, so a mask there counts for nothing.
    """
    if sample.loss_mask is None:
        return sample.response_length
    return sum(1 for entry in sample.loss_mask[1:] if entry)


def count(samples: Iterable[Sample]) -> Denominators:
    """Count the denominators of one optimizer step over all its samples, on every rank."""
    lengths = [learned_tokens(sample) for sample in samples]
    return Denominators(sequences=len(lengths), tokens=sum(lengths))


def token_weights(
    loss_mask_BT: Tensor,
    response_lengths_B: Tensor,
    denominators: Denominators,
    config: LossConfig,
    length_constant: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights w such that the objective is the sum over all tokens of w times the token's own term.

    sequence-mean: 1 / (N |o_i|), DeepSeekMath (arXiv 2402.03300) eq. 3; token-mean: 1 / sum |o_i|,
    DAPO (arXiv 2503.14476) eq. 8; constant: 1 / (N length_constant), Dr. GRPO. All are constant
    within a sequence and zero where the mask is; a sequence of length 0 and a denominator of 0 give
    zeros.

    Args:
        loss_mask_BT: [B, T] bool, integer or float, non-zero where a token is learned.
        response_lengths_B: [B] |o_i|, learned tokens of each FULL sequence (`learned_tokens`), also
            where the mask is a slice of it.
        denominators: counted over the whole optimizer step.
        config: the aggregation, and its constant if it sets one.
        length_constant: used where config.length_constant is None: the stage's max_new_tokens.
        dtype: of the result; float64 serves tests.

    Returns:
        [B, T] weights >= 0.

    Raises:
        ValueError: aggregation "constant" without a constant.
    """
    mask = loss_mask_BT.bool()
    lengths = response_lengths_B.double().unsqueeze(1)
    if config.aggregation == "sequence-mean":
        per_sequence = denominators.sequences * lengths
    elif config.aggregation == "token-mean":
        per_sequence = torch.full_like(lengths, denominators.tokens)
    else:
        constant = config.length_constant if config.length_constant is not None else length_constant
        if constant is None:
            raise ValueError('aggregation "constant" needs a length_constant, got None')
        per_sequence = torch.full_like(lengths, denominators.sequences * constant)
    per_token = torch.where(per_sequence > 0, 1 / per_sequence, torch.zeros_like(per_sequence))
    return torch.where(mask, per_token, torch.zeros_like(per_token)).to(dtype)
