"""Which samples share a row: planning micro-batches from nothing but the lengths of sequences.

`data/batching.py` asks for a plan, `[shards][micro-batches]` lists of sample indices, and builds its tensors. Packed
(`pack`): a micro-batch is one row of sequences behind one another. Padded (`cut`): one row a sequence, all as long as
the longest. Every shard (data-parallel rank) gets equally many micro-batches, because pipeline and expert parallelism
need all ranks to step together; an empty list of indices is a filler. The i-th micro-batches of all shards run at the
same time, so they are alike in size, and each shard's come longest first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heapreplace
from math import lcm

Rows = list[int]
"""Indices of the samples in one micro-batch; empty in a filler."""


def round_up(length: int, multiple_of: int) -> int:
    """The smallest multiple that is not below `length`."""
    return -(-length // multiple_of) * multiple_of


def pack(
    lengths: Sequence[int],
    budget: int,
    shards: int = 1,
    *,
    sequence_multiple_of: int = 1,
    multiple_of: int = 1,
    count_multiple_of: int = 1,
) -> list[list[Rows]]:
    """Sequences into as few rows of at most `budget` tokens as best-fit decreasing finds, then dealt to shards.

    The number of rows is rounded up to a multiple of shards * count_multiple_of and the tokens are spread evenly over
    that many; only where there are fewer samples than rows do fillers end the lists. Deterministic.

    Args:
        lengths: tokens of each sample, at least 1.
        budget: most tokens of a row; a longer sample gets a row of its own.
        shards: data-parallel ranks.
        sequence_multiple_of: each sequence takes its length rounded up to this (2 x the context size).
        multiple_of: rows are as long as their sequences, rounded up to this.
        count_multiple_of: the rows of a shard are a multiple of this.

    Returns:
        [shards] lists of equally many rows; all empty where there are no samples.
    """
    sizes = [round_up(length, sequence_multiple_of) for length in lengths]
    budget -= budget % lcm(multiple_of, sequence_multiple_of)
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    count = round_up(len(_best_fit(order, sizes, budget)), shards * count_multiple_of)
    rows = _spread(order, sizes, count)
    if any(len(row) > 1 and sum(sizes[i] for i in row) > budget for row in rows):
        rows = _smallest_rows(order, sizes, budget, count)
    return _deal_rows(rows, sizes, budget, count // shards, shards)


def _best_fit(order: Sequence[int], sizes: Sequence[int], capacity: int) -> list[Rows]:
    """Best-fit decreasing: each sequence into the fullest row that still has room for it, else a new row."""
    rows: list[Rows] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), ascending
    for index in order:
        size = sizes[index]
        place = bisect_left(room, (size, -1))
        if place == len(room):
            rows.append([index])
            insort(room, (max(0, capacity - size), len(rows) - 1))
        else:
            free, row = room.pop(place)
            rows[row].append(index)
            insort(room, (free - size, row))
    return rows


def _spread(order: Sequence[int], sizes: Sequence[int], count: int) -> list[Rows]:
    """Each sequence, longest first, to the row with the fewest tokens: very even, whatever the rows grow to."""
    rows: list[Rows] = [[] for _ in range(min(count, len(order)))]
    loads = [(0, row) for row in range(len(rows))]
    heapify(loads)
    for index in order:
        load, row = loads[0]
        rows[row].append(index)
        heapreplace(loads, (load + sizes[index], row))
    return rows


def _smallest_rows(order: Sequence[int], sizes: Sequence[int], budget: int, count: int) -> list[Rows]:
    """Best fit at the smallest capacity that needs no more than `count` rows: all are about equally full."""
    low, high = 1, budget
    rows = _best_fit(order, sizes, high)
    while low < high:
        middle = (low + high) // 2
        tried = _best_fit(order, sizes, middle)
        if len(tried) <= count:
            rows, high = tried, middle
        else:
            low = middle + 1
    while len(rows) < count and any(len(row) > 1 for row in rows):
        largest = max((row for row in rows if len(row) > 1), key=lambda row: sum(sizes[i] for i in row))
        rows.remove(largest)
        rows += _spread(largest, sizes, 2)
    return rows


def _deal_rows(rows: Sequence[Rows], sizes: Sequence[int], budget: int, rounds: int, shards: int) -> list[list[Rows]]:
    """Rows of like size to one round; in each round the larger row to the shard that had less so far.

    Attention costs the square of a sequence's length. Rows that differ by less than a hundredth of the budget are
    ordered by it, so that ranks that step together wait little for one another, and a row's cost is its tokens plus its
    squares over the budget: a sequence that fills a row costs as much in attention as everywhere else.
    """
    tokens = [sum(sizes[i] for i in row) for row in rows]
    squares = [sum(sizes[i] ** 2 for i in row) for row in rows]
    grain = max(1, budget // 100)
    order = sorted(range(len(rows)), key=lambda r: (-(tokens[r] // grain), -squares[r], -tokens[r], rows[r]))
    plan: list[list[Rows]] = [[] for _ in range(shards)]
    loads = [0.0] * shards
    for i in range(rounds):
        costs = {r: tokens[r] + squares[r] / max(1, budget) for r in order[i * shards : (i + 1) * shards]}
        poorest = sorted(range(shards), key=lambda shard: (loads[shard], shard))
        for shard, r in zip(poorest, costs, strict=False):
            plan[shard].append(rows[r])
            loads[shard] += costs[r]
        for shard in poorest[len(costs) :]:
            plan[shard].append([])
    return plan


def cut(
    lengths: Sequence[int],
    budget: int,
    shards: int = 1,
    *,
    multiple_of: int = 1,
    count_multiple_of: int = 1,
) -> list[list[Rows]]:
    """Sequences of similar length into padded micro-batches of at most `budget` tokens, padding included.

    Args:
        lengths: tokens of each sample, at least 1.
        budget: most padded tokens of a micro-batch; a longer sample gets one of its own.
        shards: data-parallel ranks.
        multiple_of: rows are as long as the longest, rounded up to this.
        count_multiple_of: fillers make the number of micro-batches of a shard a multiple of this.

    Returns:
        [shards] lists of equally many micro-batches, longest sample first; all empty where there are no samples.
    """
    padded = [round_up(length, multiple_of) for length in lengths]
    batches = _cut_evenly(padded, budget, shards)
    room = -(-len(batches) // shards)
    plan: list[list[Rows]] = [[] for _ in range(shards)]
    loads = [0] * shards
    for rows in sorted(batches, key=lambda rows: (-_cost(rows, padded), rows[0])):
        shard = min((i for i in range(shards) if len(plan[i]) < room), key=lambda i: (loads[i], i))
        plan[shard].append(rows)
        loads[shard] += _cost(rows, padded)
    count = round_up(room, count_multiple_of)
    return [[*shard, *([] for _ in range(count - len(shard)))] for shard in plan]


def _cut_evenly(padded: Sequence[int], budget: int, shards: int) -> list[Rows]:
    """As few as the budget allows, rounded up to a multiple of `shards`, as even as they come."""
    order = sorted(range(len(padded)), key=lambda i: (-padded[i], i))
    fewest = len(_cut(order, padded, budget))
    target = round_up(fewest, shards)
    # The smallest budget that still needs no more than `target` makes them all about as large.
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_cut(order, padded, middle)) <= target:
            high = middle
        else:
            low = middle + 1
    batches = _cut(order, padded, high)
    while batches and len(batches) % shards:
        largest = max(batches, key=lambda rows: (len(rows) > 1, _cost(rows, padded)))
        if len(largest) == 1:
            break  # only single rows are left: fillers make up the number
        batches.remove(largest)
        half = (len(largest) + 1) // 2
        batches += [largest[:half], largest[half:]]
    return batches


def _cut(order: Sequence[int], padded: Sequence[int], budget: int) -> list[Rows]:
    """Greedy from the longest on: as many rows as fit at the first one's padded length."""
    batches: list[Rows] = []
    start = 0
    while start < len(order):
        rows = max(1, budget // padded[order[start]])
        batches.append(list(order[start : start + rows]))
        start += rows
    return batches


def _cost(rows: Rows, padded: Sequence[int]) -> int:
    """Padded tokens of a micro-batch; its first row is the longest."""
    return len(rows) * padded[rows[0]]
