"""Zig-zag context slices, by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.parallel.context import context_slice, zigzag_positions


def test_positions_by_hand() -> None:
    assert zigzag_positions(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert zigzag_positions(8, 2, 1).tolist() == [2, 3, 4, 5]
    assert zigzag_positions(6, 3, 1).tolist() == [1, 4]
    assert zigzag_positions(4, 1, 0).tolist() == [0, 1, 2, 3]


def test_ranks_partition_the_sequence_and_share_the_work() -> None:
    ranks = [zigzag_positions(48, 4, r).tolist() for r in range(4)]
    assert sorted(position for held in ranks for position in held) == list(range(48))
    # the number of keys that a causal query sees is its position + 1
    assert len({sum(position + 1 for position in held) for held in ranks}) == 1


def test_slices_of_a_tensor() -> None:
    x = torch.arange(16).reshape(2, 8)
    assert context_slice(x, 2, 1).tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert context_slice(x.T, 2, 0, dim=0).tolist() == [[0, 8], [1, 9], [6, 14], [7, 15]]
    assert context_slice(x, 1, 0) is x


def test_a_length_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="length 10 does not divide by 2 x context size 2"):
        zigzag_positions(10, 2, 0)
