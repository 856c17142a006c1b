"""Core attention on torch's scaled_dot_product_attention, for machines without Transformer Engine.

Plugs into the local layer spec (`model/specs.py`) where Megatron's own core attention has neither distinct key and
value widths (MLA) nor packed rows nor context parallelism.

Shapes: S query tokens, K key tokens, B rows, N heads, D head width; in a packed row T tokens of several segments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.parallel.context import zigzag

_ALIKE = 0.75  # segments at least this long, relative to the longest of their group, are attended to together


class TorchCoreAttention(MegatronModule):
    """Causal attention: grouped queries, key width != value width, packed (thd) rows, context parallelism, decode.

    Context parallelism gathers keys and values over the group (zig-zag order) and masks by position. In a packed row
    each segment attends to itself only. When there are fewer queries than keys, the queries are the last ones
    (decoding with a KV cache).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.context_group: Any = getattr(pg_collection, "cp", None)
        self.context_size = self.context_group.size() if self.context_group is not None else 1
        self.scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_KBND: torch.Tensor,
        value_KBND: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Returns [S, B, N * D_value]; with packed_seq_params inputs are [T, N, D] and the output [T, N * D_value].

        Under context parallelism S and T count this rank's tokens; the bounds of packed segments are the whole row's.
        """
        if self.context_size > 1:
            key_KBND, value_KBND = (self._gather(x) for x in (key_KBND, value_KBND))
        if packed_seq_params is not None:
            return self._packed(query_SBND, key_KBND, value_KBND, packed_seq_params.cu_seqlens_q.tolist())
        if self.context_size > 1:
            size, rank = self.context_size, self.context_group.rank()
            held = torch.cat([_positions(key_KBND.shape[0], size, r) for r in range(size)])
            mine = _positions(key_KBND.shape[0], size, rank)
            seen_SK = (held[None, :] <= mine[:, None]).to(query_SBND.device)
            return self._attend(query_SBND, key_KBND, value_KBND, mask=seen_SK)
        queries, keys = query_SBND.shape[0], key_KBND.shape[0]
        mask = None
        if 1 < queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query_SBND.device).tril(keys - queries)
        return self._attend(query_SBND, key_KBND, value_KBND, causal=queries == keys, mask=mask)

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """All context ranks' tokens, one rank after the other; gradients are summed back."""
        return tensor_parallel.gather_from_sequence_parallel_region(x.contiguous(), True, group=self.context_group)

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int]) -> torch.Tensor:
        rank = self.context_group.rank() if self.context_size > 1 else 0
        groups, order = _segment_groups(tuple(bounds), self.context_size, rank)
        parts = []
        for group in groups:
            q = query[group.queries_GS].transpose(0, 1)
            k, v = (x[group.keys_GK].transpose(0, 1) for x in (key, value))
            mask = None
            if group.positions_GS is not None:
                mask = torch.arange(group.keys_GK.shape[1]) <= group.positions_GS[:, None, :, None]
                mask = mask.to(query.device)
            out_SGE = self._attend(q, k, v, causal=mask is None, mask=mask)
            parts.append(out_SGE.transpose(0, 1).flatten(0, 1)[group.real])
        return torch.cat(parts)[order]

    def _attend(
        self,
        query_SBND: torch.Tensor,
        key_SBND: torch.Tensor,
        value_SBND: torch.Tensor,
        causal: bool = False,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBND, value_SBND))
        grouped = q.shape[1] != k.shape[1]
        out_BNSD = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=grouped
        )
        return out_BNSD.permute(2, 0, 1, 3).reshape(q.shape[2], q.shape[0], -1)


@dataclass(frozen=True, slots=True)
class _SegmentGroup:
    """G segments of similar length, padded to the longest: where their tokens lie in the row."""

    queries_GS: torch.Tensor  # int64, in this rank's tokens
    keys_GK: torch.Tensor  # int64, in the gathered tokens of all context ranks
    positions_GS: torch.Tensor | None  # int64, each query's position in its segment; None: all of it in order
    real: torch.Tensor  # int64, the unpadded ones among the G x S queries


@lru_cache(maxsize=256)  # every layer of a micro-batch asks for the same
def _segment_groups(
    bounds: tuple[int, ...], context_size: int, context_rank: int
) -> tuple[list[_SegmentGroup], torch.Tensor]:
    """The groups of a row's segments, and where each local token lies in the groups' concatenated real queries."""
    lengths = sorted(((b - a, a) for a, b in pairwise(bounds) if b > a), reverse=True)
    groups: list[list[tuple[int, int]]] = []
    for length, start in lengths:
        if not groups or length < _ALIKE * groups[-1][0][0]:
            groups.append([])
        groups[-1].append((length, start))
    local = bounds[-1] // context_size
    made = [_group(members, local, context_size, context_rank) for members in groups]
    held = torch.cat([group.queries_GS.flatten()[group.real] for group in made])
    return made, torch.argsort(held)


def _positions(length: int, size: int, rank: int) -> torch.Tensor:
    """[length / size] int64 positions of a segment that context-parallel rank `rank` holds."""
    return torch.from_numpy(zigzag([0, length], size, rank))


def _group(segments: list[tuple[int, int]], local: int, size: int, rank: int) -> _SegmentGroup:
    longest = segments[0][0]
    queries, keys, places = [], [], []
    for length, start in segments:
        # Segment token at position p: held by rank r at index place[p] of the gathered row.
        positions = [_positions(length, size, r) for r in range(size)]
        place = torch.empty(length, dtype=torch.int64)
        for r, held in enumerate(positions):
            place[held] = r * local + start // size + torch.arange(len(held))
        keys.append(F.pad(place, (0, longest - length), value=int(place[0])))
        mine = positions[rank]
        first = start // size
        queries.append(F.pad(first + torch.arange(len(mine)), (0, longest // size - len(mine)), value=first))
        places.append(F.pad(mine, (0, longest // size - len(mine)), value=0))
    sizes = torch.tensor([length // size for length, _ in segments])
    real = (torch.arange(longest // size)[None, :] < sizes[:, None]).flatten().nonzero()[:, 0]
    return _SegmentGroup(torch.stack(queries), torch.stack(keys), None if size == 1 else torch.stack(places), real)
