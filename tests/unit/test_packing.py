"""Plans of packed and padded micro-batches: nothing lost, nothing over the budget, dense, even, alike in each round."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data import packing
from megatron_r1.data.packing import Rows, cut, pack, round_up

Plan = list[list[Rows]]


def used(row: Rows, lengths: Sequence[int], multiple: int = 1) -> int:
    return sum(round_up(lengths[i], multiple) for i in row)


def loads(plan: Plan, lengths: Sequence[int]) -> list[int]:
    return [sum(used(row, lengths) for row in shard) for shard in plan]


def fewest_rows(lengths: Sequence[int], budget: int) -> int:
    """Slow reference: every assignment of samples to rows."""
    best = len(lengths)
    for rows in product(range(len(lengths)), repeat=len(lengths)):
        totals = [sum(n for n, row in zip(lengths, rows, strict=True) if row == r) for r in set(rows)]
        if max(totals) <= budget:
            best = min(best, len(totals))
    return best


def r1_like(count: int) -> list[int]:
    """Log-normal with sigma 0.8, cut at 32,768, mean 5,355 as R1's responses."""
    draws = np.random.default_rng(0).lognormal(np.log(3906), 0.8, count)
    return np.clip(draws, 1, 32_768).astype(int).tolist()


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), max_size=60),
    budget=st.integers(1, 128),
    shards=st.integers(1, 5),
    sequence_multiple_of=st.sampled_from([1, 2, 4]),
    multiple_of=st.sampled_from([1, 3, 8]),
    count_multiple_of=st.integers(1, 3),
)
def test_pack_keeps_its_promises(
    lengths: list[int],
    budget: int,
    shards: int,
    sequence_multiple_of: int,
    multiple_of: int,
    count_multiple_of: int,
) -> None:
    keys = dict(sequence_multiple_of=sequence_multiple_of, multiple_of=multiple_of, count_multiple_of=count_multiple_of)
    plan = pack(lengths, budget, shards, **keys)
    assert plan == pack(lengths, budget, shards, **keys)
    assert sorted(i for shard in plan for row in shard for i in row) == list(range(len(lengths)))
    assert len(plan) == shards
    assert len({len(shard) for shard in plan}) == 1
    assert len(plan[0]) % count_multiple_of == 0
    for shard in plan:
        filled = [bool(row) for row in shard]
        assert filled == sorted(filled, reverse=True)  # fillers end the list
        totals = [used(row, lengths, sequence_multiple_of) for row in shard]
        assert totals == sorted(totals, reverse=True)  # longest first: the grain is one token at such a budget
        for row, total in zip(shard, totals, strict=True):
            assert len(row) <= 1 or round_up(round_up(total, sequence_multiple_of), multiple_of) <= budget
    if any(not row for shard in plan for row in shard):  # a filler only where every row is down to one sample
        assert all(len(row) <= 1 for shard in plan for row in shard)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_small_plans_need_the_fewest_rows(lengths: list[int]) -> None:
    """Best-fit decreasing is optimal up to five sequences; the reference tries every assignment."""
    (shard,) = pack(lengths, 12)
    assert len(shard) == fewest_rows(lengths, 12)


@pytest.mark.parametrize("shards", [1, 8, 16, 64])
def test_r1_lengths_are_packed_densely_and_evenly(shards: int) -> None:
    lengths = r1_like(8192)
    plan = pack(lengths, 32_768, shards)
    rows = sum(len(shard) for shard in plan)
    least = round_up(-(-sum(lengths) // 32_768), shards)  # no plan with equally many rows a shard has fewer
    assert rows <= least + (2 if shards == 1 else 0)
    assert sum(lengths) / (rows * 32_768) >= 0.98
    found = loads(plan, lengths)
    assert max(found) / np.mean(found) - 1 < 0.002
    squares = [sum(lengths[i] ** 2 for row in shard for i in row) for shard in plan]
    assert max(squares) / np.mean(squares) - 1 < 0.1
    together = np.array([[used(row, lengths) for row in shard] for shard in plan])
    assert together.max(0).sum() / together.mean(0).sum() - 1 < 0.002  # nobody waits for a longer row


def test_rows_that_step_together_have_alike_attention() -> None:
    """Eight rows of 400 tokens: four of one long sequence, four of 40 short ones. Each round pairs like with like."""
    lengths = ([400] + [10] * 40) * 4
    plan = pack(lengths, 400, shards=2)
    kinds = [[len(row) for row in shard] for shard in plan]
    assert kinds == [[1, 1, 40, 40]] * 2


def test_attention_is_dealt_evenly() -> None:
    """Four rows of 100 tokens with squares 10000, 8200, 6800 and 5000: 15000 a shard, and not 16800 and 13200."""
    lengths = [100, 90, 10, 80, 20, 50, 50]
    plan = pack(lengths, 100, shards=2)
    assert [[sum(lengths[i] ** 2 for i in row) for row in shard] for shard in plan] == [[10_000, 5_000], [8_200, 6_800]]


def test_the_larger_row_goes_to_the_shard_that_had_less() -> None:
    """Two rounds, rows of 90 and 80, then of 60 and 40: 130 and 140. Dealing in order would give 150 and 120."""
    lengths = [90, 80, 60, 40]
    assert loads(pack(lengths, 90, shards=2), lengths) == [130, 140]


def test_rounding_the_row_up_stays_in_the_budget() -> None:
    """Two samples of 5 would fit in 10 tokens, but not rounded up to 16; in 16 they do."""
    assert pack([5, 5], 10, multiple_of=8) == [[[0], [1]]]
    assert pack([5, 5], 17, multiple_of=8) == [[[0, 1]]]
    assert pack([5, 5], 17, sequence_multiple_of=6, multiple_of=4) == [[[0, 1]]]
    assert pack([5, 5], 23, sequence_multiple_of=6, multiple_of=8) == [[[0], [1]]]  # 12 -> 24


def test_splits_before_it_fills() -> None:
    """Eight short samples fit in one row; four shards get two each, and with three rows a shard eight get one."""
    assert [[len(row) for row in shard] for shard in pack([4] * 8, 64, 4)] == [[2]] * 4
    assert [[len(row) for row in shard] for shard in pack([4] * 8, 64, 4, count_multiple_of=3)] == [[1, 1, 0]] * 4


def test_no_row_stays_nearly_empty() -> None:
    """Five samples of 20 fit two rows of 64 as 60 and 40; 21 of 10 fit three rows as evenly as 70, 70, 70."""
    assert sorted(used(row, [20] * 5) for row in pack([20] * 5, 64)[0]) == [40, 60]
    assert [used(row, [10] * 21) for row in pack([10] * 21, 100)[0]] == [70, 70, 70]


def test_a_tight_fit_is_packed_where_spreading_overflows() -> None:
    """Longest first to the emptier row ends at 9 and 11; best fit finds 5 + 5 and 4 + 3 + 3."""
    lengths = [5, 5, 4, 3, 3]
    assert pack(lengths, 10) == [[[0, 1], [2, 3, 4]]]
    assert pack(lengths, 11) == [[[1, 3, 4], [0, 2]]]  # it fits: 11 and 9


def test_best_fit_makes_up_the_number_of_rows() -> None:
    """Nine samples of 10: a capacity of 30 gives three rows and one below gives five, so four come of a split."""
    rows = packing._smallest_rows(range(9), [10] * 9, budget=100, count=4)
    assert sorted(map(len, rows)) == [1, 2, 3, 3]


def test_a_sample_longer_than_the_budget_goes_alone() -> None:
    assert pack([100, 4, 4], 16) == [[[0], [1, 2]]]
    assert cut([100, 4, 4], 16) == [[[0], [1, 2]]]


def test_fillers_where_there_are_fewer_samples_than_shards() -> None:
    assert pack([4, 7], 64, 4) == [[[1]], [[0]], [[]], [[]]]
    assert cut([4, 7], 64, 4) == [[[1]], [[0]], [[]], [[]]]


def test_no_samples() -> None:
    assert pack([], 64, 3, count_multiple_of=2) == [[], [], []]
    assert cut([], 64, 3, count_multiple_of=2) == [[], [], []]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 64, 200])
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("budget", "multiple_of"), [(1, 1), (64, 1), (64, 8), (512, 4)])
def test_cut_keeps_its_promises(count: int, shards: int, budget: int, multiple_of: int) -> None:
    rng = random.Random(count)
    lengths = [rng.randint(2, 60) for _ in range(count)]
    plan = cut(lengths, budget, shards, multiple_of=multiple_of, count_multiple_of=2)
    assert sorted(i for shard in plan for rows in shard for i in rows) == list(range(count))
    assert len(plan) == shards
    assert len({len(shard) for shard in plan}) == 1
    assert len(plan[0]) % 2 == 0
    for shard in plan:
        costs = [len(rows) * max((round_up(lengths[i], multiple_of) for i in rows), default=0) for rows in shard]
        assert costs == sorted(costs, reverse=True)
        assert all(cost <= budget or len(rows) == 1 for rows, cost in zip(shard, costs, strict=True))


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_cut_is_balanced(shards: int) -> None:
    rng = random.Random(4)
    lengths = [rng.randint(2, 120) for _ in range(256)]
    plan = cut(lengths, 1024, shards)
    found = [sum(len(rows) * max(lengths[i] for i in rows) for rows in shard if rows) for shard in plan]
    assert max(found) <= 1.1 * min(found)
    assert sum(found) / sum(lengths) < 1.15


def test_cut_deals_even_work_evenly() -> None:
    """Nine rows of 10 fit in three micro-batches of 30; two ranks get 50 and 40, not 60 and 30."""
    plan = cut([10] * 9, 30, 2)
    assert sorted(loads(plan, [10] * 9)) == [40, 50]
    assert [[len(rows) for rows in shard] for shard in cut([4] * 8, 64, 4)] == [[2]] * 4
