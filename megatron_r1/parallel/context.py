"""Context parallelism: which positions of a sequence a rank holds.

A sequence is cut into 2 * size chunks and rank r holds chunks r and 2 * size - 1 - r, so that causal attention costs
every rank the same.
"""

from __future__ import annotations

import torch


def zigzag_positions(length: int, size: int, rank: int) -> torch.Tensor:
    """[length / size] int64 positions that context-parallel rank `rank` holds; length must divide by 2 * size."""
    if length % (2 * size):
        raise ValueError(f"sequence length {length} does not divide by 2 x context size {size}")
    chunk = length // (2 * size)
    last = 2 * size - 1 - rank
    return torch.cat([torch.arange(rank * chunk, (rank + 1) * chunk), torch.arange(last * chunk, (last + 1) * chunk)])


def context_slice(x: torch.Tensor, size: int, rank: int, dim: int = 1) -> torch.Tensor:
    """The part of `x` along `dim` that this rank holds; `x` itself when size is 1."""
    if size == 1:
        return x
    return x.index_select(dim, zigzag_positions(x.shape[dim], size, rank).to(x.device))
