"""Which positions of a row context-parallel ranks hold, by hand."""

from __future__ import annotations

import pytest

from megatron_r1.parallel.context import zigzag


def test_zigzag_by_hand() -> None:
    """Segments of 8 and 4 tokens over two ranks: chunks 0 and 3 of each to rank 0, 1 and 2 to rank 1."""
    assert zigzag([0, 8, 12], 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag([0, 8, 12], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert zigzag([0, 3, 5], 1, 0).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="a segment of 6 tokens does not divide by 2 x context size 2"):
        zigzag([0, 4, 10], 2, 0)


def test_ranks_partition_the_sequence_and_share_the_work() -> None:
    ranks = [zigzag([0, 48], 4, r).tolist() for r in range(4)]
    assert sorted(position for held in ranks for position in held) == list(range(48))
    # the number of keys that a causal query sees is its position + 1
    assert len({sum(position + 1 for position in held) for held in ranks}) == 1
