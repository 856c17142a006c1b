"""A micro-batch through the model, and its scores back in the order of its sequences.

N sequences, L learned tokens of the longest, M scored tokens in a row, D depths of multi-token prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_r1.data.batching import MicroBatch
from megatron_r1.model.gpt import TokenQuery
from megatron_r1.model.scalar_head import ValueQuery


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model says of the learned tokens of a micro-batch; 0 where this rank holds none."""

    log_probs_NL: torch.Tensor  # float32, differentiable
    entropy_NL: torch.Tensor  # float32, without gradient
    ahead_DNL: torch.Tensor  # float32 log-probs of the same tokens, predicted 1..D tokens earlier


def score_tokens(
    model: torch.nn.Module, batch: MicroBatch, *, temperature: float = 1.0, detach_ahead: bool = False
) -> torch.Tensor:
    """This pipeline stage's output: scores of the learned tokens on the last stage, see `PolicyModel`."""
    query = TokenQuery(
        index_M=batch.where_NL[batch.mask_NL],
        targets_M=batch.targets_NL[batch.mask_NL],
        temperature=temperature,
        ahead=tuple((where[where >= 0], batch.targets_NL[where >= 0]) for where in batch.ahead_DNL),
        detach_ahead=detach_ahead,
    )
    return _run(model, batch, query)


def score_sequences(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """This pipeline stage's output: on the last one [M], a reward model's values of the sequences that end here."""
    return _run(model, batch, ValueQuery(index_M=batch.last_N[batch.last_N >= 0]))


def _run(model: torch.nn.Module, batch: MicroBatch, query: TokenQuery | ValueQuery) -> torch.Tensor:
    packed = None if batch.bounds is None else _packed(batch.bounds, batch.tokens_BT.device)
    return model(batch.tokens_BT, batch.positions_BT, None, packed_seq_params=packed, query=query)


def by_sequence(output: torch.Tensor, batch: MicroBatch) -> Scores:
    """The last stage's output of `score_tokens`, as [N, L] matrices."""
    places = [batch.mask_NL, *(where >= 0 for where in batch.ahead_DNL)]
    parts = output.split([int(place.sum()) for place in places], dim=1)
    zeros = output.new_zeros(batch.where_NL.shape)
    log_probs = [zeros.masked_scatter(place, part[0]) for place, part in zip(places, parts, strict=True)]
    return Scores(
        log_probs_NL=log_probs[0],
        entropy_NL=zeros.masked_scatter(places[0], parts[0][1]),
        ahead_DNL=torch.stack(log_probs[1:]) if log_probs[1:] else zeros.new_zeros(0, *zeros.shape),
    )


def _packed(bounds: list[int], device: torch.device) -> PackedSeqParams:
    """Segments of a packed row for the attention; padding belongs to segments, so there is one list of bounds."""
    ends = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in pairwise(bounds))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=ends,
        cu_seqlens_kv_padded=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
