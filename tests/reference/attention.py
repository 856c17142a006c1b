"""Causal attention one query at a time."""

from __future__ import annotations

import math

import torch


def slow_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """[S, B, N, D], [K, B, G, D], [K, B, G, E] -> [S, B, N * E]; the queries are the last S of the K positions.

    Head n reads key-value group n // (N / G). scale None: 1 / sqrt(D).
    """
    queries, rows, heads, width = query.shape
    keys, _, groups, _ = key.shape
    factor = 1 / math.sqrt(width) if scale is None else scale
    out = []
    for s in range(queries):
        seen = keys - queries + s + 1
        for b in range(rows):
            for n in range(heads):
                group = n // (heads // groups)
                weights = torch.softmax(key[:seen, b, group] @ query[s, b, n] * factor, dim=0)
                out.append(weights @ value[:seen, b, group])
    return torch.stack(out).reshape(queries, rows, -1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight
