"""How full rows are, how even ranks are, and how long planning takes: packed rows against padded micro-batches.

    python benchmarks/packing.py
    python benchmarks/packing.py --sigma 1.2 --shards 8 --context 4

--samples lengths as of one rollout phase of R1, prompts included: log-normal with --sigma, rounded, cut at --longest,
the median chosen so that their mean is --mean. Sides, at the same --budget: `packed` is `pack` of `data/packing.py`,
`padded` is `cut` beside it, which takes samples of like length together. Both plan for each number of --shards, in one
thread; with --context every sequence is rounded up to 2 x that many tokens.

density: real tokens / (rows x budget), a padded micro-batch counting as a row, fillers too. computed: real tokens /
tokens that go through the model, padding included, fillers not. imbalance: the fullest shard's real tokens / their mean
- 1; squares: the same of the sum of squared lengths, which attention costs. waiting: if a step over a row took time in
proportion to its real tokens and the shards met after each, the share that they would add by waiting.

Prints a table, then one JSON object on the last line: of the shard numbers the worst for packed, the best for padded.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import numpy as np
from machine import commit, machine

from megatron_r1.data.packing import Rows, cut, pack, round_up

COLUMNS = ("density", "computed", "imbalance", "squares", "waiting", "seconds")
HIGHER_IS_BETTER = ("density", "computed")


def main() -> None:
    """Plan both ways for every number of shards and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--mean", type=float, default=5355.0, help="tokens of a sequence")
    parser.add_argument("--sigma", type=float, default=0.8, help="standard deviation of the lengths' logarithm")
    parser.add_argument("--longest", type=int, default=32_768)
    parser.add_argument("--budget", type=int, default=32_768, help="tokens of a row")
    parser.add_argument("--shards", type=int, nargs="+", default=[8, 16, 64], help="data-parallel ranks")
    parser.add_argument("--context", type=int, default=1, help="context-parallel size")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lengths = draw_lengths(arguments)
    print(f"{machine()}; commit {commit()}")
    print(
        f"{len(lengths)} samples, log-normal with sigma {arguments.sigma}, mean {np.mean(lengths):.1f}, median "
        f"{np.median(lengths):.0f}, longest {max(lengths)} tokens; {lengths.count(arguments.longest)} cut at "
        f"{arguments.longest}; budget {arguments.budget}"
    )
    sides: dict[str, list[dict[str, float]]] = {"packed": [], "padded": []}
    for shards in arguments.shards:
        for side, rows in sides.items():
            rows.append(measure(side, lengths, shards, arguments.budget, arguments.context))
    print(table(sides))
    result = {
        **{name: (min if name in HIGHER_IS_BETTER else max)(row[name] for row in sides["packed"]) for name in COLUMNS},
        **{
            f"padded_{name}": (max if name in HIGHER_IS_BETTER else min)(row[name] for row in sides["padded"])
            for name in COLUMNS
        },
        **vars(arguments),
        "mean": float(np.mean(lengths)),
        "machine": machine(),
        "commit": commit(),
    }
    print(json.dumps(result))


def draw_lengths(arguments: argparse.Namespace) -> list[int]:
    """Lengths whose mean, after rounding and cutting, is the one asked for."""
    shape = np.exp(arguments.sigma * np.random.default_rng(arguments.seed).standard_normal(arguments.samples))

    def lengths(median: float) -> np.ndarray:
        return np.clip(np.rint(median * shape), 1, arguments.longest).astype(np.int64)

    low, high = 1.0, float(arguments.longest)
    for _ in range(60):  # the mean rises with the median
        middle = (low + high) / 2
        low, high = (middle, high) if lengths(middle).mean() < arguments.mean else (low, middle)
    return lengths(high).tolist()


def measure(side: str, lengths: list[int], shards: int, budget: int, context: int) -> dict[str, float]:
    """One side's plan, timed and judged."""
    multiple = 2 * context if context > 1 else 1
    start = time.perf_counter()
    if side == "packed":
        plan = pack(lengths, budget, shards, sequence_multiple_of=multiple)
    else:
        plan = cut(lengths, budget, shards, multiple_of=multiple)
    seconds = time.perf_counter() - start
    if sorted(i for shard in plan for row in shard for i in row) != list(range(len(lengths))):
        raise RuntimeError(f"the {side} plan does not hold every sample once")

    def padded(row: Rows) -> int:
        sizes = [round_up(lengths[i], multiple) for i in row]
        return sum(sizes) if side == "packed" else len(row) * max(sizes, default=0)

    tokens = per_row(plan, lengths)
    squares = per_row(plan, [length**2 for length in lengths])
    return {
        "shards": shards,
        "rows": tokens.size,
        "density": tokens.sum() / (tokens.size * budget),
        "computed": tokens.sum() / sum(padded(row) for shard in plan for row in shard),
        "imbalance": tokens.sum(1).max() / tokens.sum(1).mean() - 1,
        "squares": squares.sum(1).max() / squares.sum(1).mean() - 1,
        "waiting": tokens.max(0).sum() / tokens.mean(0).sum() - 1,
        "seconds": seconds,
    }


def per_row(plan: Sequence[Sequence[Rows]], values: Sequence[int]) -> np.ndarray:
    """[shards, rows] sums of a value over each row's samples."""
    return np.array([[sum(values[i] for i in row) for row in shard] for shard in plan], dtype=np.float64)


def table(sides: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table, one row for each side and number of shards."""
    lines = ["| side | shards | rows | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 3) + "|"]
    for side, rows in sides.items():
        for row in rows:
            cells = [f"{row[name]:.2f}" if name == "seconds" else f"{100 * row[name]:.2f} %" for name in COLUMNS]
            lines.append(f"| {side} | {row['shards']:.0f} | {row['rows']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
