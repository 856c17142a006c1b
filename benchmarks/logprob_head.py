"""Memory and time of the log-prob head against full logits: one forward and backward pass of either.

    python benchmarks/logprob_head.py
    python benchmarks/logprob_head.py --tokens 1024 --vocabulary 32000 --repeats 1

Log-probs of --tokens tokens of a vocabulary of --vocabulary entries from float32 hidden states, with the gradients of
hidden states and output weights. Sides: `full` makes all logits with one matrix product and takes vocabulary-parallel
log-probs of them (`tests/reference/full_logits.py`); `head` is `megatron_r1.model.log_prob_head.token_log_probs`.

Either side runs --repeats times, in turn with the other, each time in a fresh process. Before a pass the process has
inputs, weights and the gradient buffers of both in memory, and has run a small pass. Memory is the process's largest
resident size during the pass (VmHWM, reset before it) less its resident size before: what the pass takes beyond
inputs, weights and gradients. Time is the pass alone. Of the repeats the smallest of each counts, for both sides.
Linux only. Prints a table, then one JSON object on the last line; the differences in it are the largest, of log-probs
in nats, of gradients relative to the largest entry.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, commit, machine

SIDES = ("full", "head")


def main() -> None:
    """Run both sides in turn and report, or, as a child, one pass of one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=129_280)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=2, help="passes of either side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: every core")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(one_pass(arguments)))
        return
    print(f"{machine()}; commit {commit()}")
    passes: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            for side in SIDES:
                keep = ["--results", f"{folder}/{side}.pt"] if repeat == 0 else []
                passes[side].append(in_child([*sys.argv[1:], "--side", side, *keep]))
        found = differences(Path(folder))
    best = {side: {name: min(p[name] for p in passes[side]) for name in passes[side][0]} for side in SIDES}
    print(table(best, passes))
    result = {
        "memory_ratio": best["head"]["extra_bytes"] / best["full"]["extra_bytes"],
        "time_ratio": best["head"]["seconds"] / best["full"]["seconds"],
        **found,
        **{f"{side}_{name}": value for side in SIDES for name, value in best[side].items()},
        **{name: getattr(arguments, name) for name in ("tokens", "vocabulary", "hidden", "repeats", "threads")},
        "machine": machine(),
        "commit": commit(),
    }
    print(json.dumps(result))


def in_child(arguments: list[str]) -> dict[str, float]:
    """What a fresh process measures."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # the plain path is a reference of the tests
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def one_pass(arguments: argparse.Namespace) -> dict[str, float]:
    """Bytes beyond what was there before, and seconds, of one forward and backward pass."""
    from megatron_r1.model.log_prob_head import token_log_probs
    from tests.reference.full_logits import full_logits_log_probs

    score = {"full": full_logits_log_probs, "head": token_log_probs}[arguments.side]
    torch.set_num_threads(arguments.threads)
    vocabulary, hidden = arguments.vocabulary, arguments.hidden
    draw = torch.Generator().manual_seed(0)
    states_NH = torch.randn(arguments.tokens, hidden, generator=draw).requires_grad_()
    weight_VH = torch.randn(vocabulary, hidden, generator=draw).mul_(2 / hidden**0.5).requires_grad_()
    targets_N = torch.randint(0, vocabulary, (arguments.tokens,), generator=draw)
    above_N = torch.randn(arguments.tokens, generator=draw)
    for x in (states_NH, weight_VH):
        x.grad = torch.full_like(x, 1.0).zero_()  # full, because fresh zeros may have no memory behind them yet
    few = (states_NH.detach()[:8].requires_grad_(), weight_VH.detach()[:64].requires_grad_(), targets_N[:8] % 64)
    score(*few, vocab_size=64)[0].sum().backward()  # libraries set themselves up
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.perf_counter()
    log_probs_N, entropy_N = score(states_NH, weight_VH, targets_N, vocab_size=vocabulary)
    (log_probs_N * above_N).sum().backward()
    seconds, extra = time.perf_counter() - start, resident("VmHWM") - before
    if arguments.results:
        torch.save([log_probs_N.detach(), entropy_N, states_NH.grad, weight_VH.grad], arguments.results)
    return {"extra_bytes": extra, "seconds": seconds}


def resident(name: str) -> int:
    """Bytes: VmRSS, the process's resident size, or VmHWM, the largest that it was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def differences(folder: Path) -> dict[str, float]:
    """How far the sides' results of the first repeat are apart."""
    full, head = (torch.load(folder / f"{side}.pt") for side in SIDES)
    apart = [(b - a).abs().max().item() for a, b in zip(full, head, strict=True)]
    largest = [a.abs().max().item() for a in full]
    return {
        "log_prob_difference": apart[0],
        "entropy_difference": apart[1],
        "gradient_difference": max(apart[2] / largest[2], apart[3] / largest[3]),
    }


def table(best: dict[str, dict[str, float]], passes: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table, one row a side."""
    lines = ["| side | extra memory, MB | seconds | seconds of every repeat |", "|---|---|---|---|"]
    for side in SIDES:
        every = ", ".join(f"{p['seconds']:.2f}" for p in passes[side])
        lines.append(f"| {side} | {best[side]['extra_bytes'] / 1e6:.0f} | {best[side]['seconds']:.2f} | {every} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
