"""Context parallelism: which positions of a row a rank holds. Batches, attention and recorded tokens share this rule.

No torch, so that planning a batch needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def zigzag(bounds: Sequence[int], size: int, rank: int) -> np.ndarray:
    """Positions of a row that a context-parallel rank holds, segment after segment.

    Every segment is cut into 2 * size chunks, of which rank r holds r and 2 * size - 1 - r, so that causal attention
    costs every rank the same. It is the order that Transformer Engine and Megatron expect of packed sequences.

    Args:
        bounds: [0, e1, e2, ..., T], the ends of the row's segments; [0, T] for a padded row.

    Returns:
        [T / size] int64; all in order when size is 1.

    Raises:
        ValueError: a segment that does not divide by 2 * size.
    """
    if size == 1:
        return np.arange(bounds[-1])
    parts = []
    for start, end in pairwise(bounds):
        chunk, rest = divmod(end - start, 2 * size)
        if rest:
            raise ValueError(f"a segment of {end - start} tokens does not divide by 2 x context size {size}")
        for which in (rank, 2 * size - 1 - rank):
            parts.append(np.arange(start + which * chunk, start + (which + 1) * chunk))
    return np.concatenate(parts)
