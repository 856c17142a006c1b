"""Block-FP8 kernels of the checkpoint converter against the plain ways to compute the same bits, on one thread.

    python benchmarks/fp8_kernels.py
    python benchmarks/fp8_kernels.py --rows 512 --columns 1024 --rounds 3

One matrix of an expert's size, bfloat16 on one side, E4M3 codes with a scale per 128x128 block on the other. Sides:
`loop` is the Python loop over blocks that conversion scripts have; `reference` is `model/block_fp8.py` on the whole
matrix; `kernel` is `convert/fp8.py`. Jobs: `dequantise`, codes to bfloat16; `quantise`, bfloat16 to codes with fresh
scales; `keep`, bfloat16 that came from codes to these codes, with every block's scale tried and kept. All sides of a
job must agree to the bit. They run in turn; the smallest processor time of --rounds counts. Prints a table, then one
JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from machine import commit, machine

from megatron_r1.convert.fp8 import Scratch, dequantise_rows, quantise_rows
from megatron_r1.model.block_fp8 import E4M3_MAX, block_scales, dequantise, quantise

B = 128
E4M3 = torch.float8_e4m3fn
Pair = tuple[torch.Tensor, torch.Tensor]
Job = Callable[[], tuple[torch.Tensor, ...]]


def main() -> None:
    """Run every side of every job in turn, compare, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=7168)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; commit {commit()}")
    torch.manual_seed(arguments.seed)
    weight = (torch.randn(arguments.rows, arguments.columns) * 0.02).bfloat16()
    codes, scale = quantise(weight, (B, B))
    untouched = dequantise(codes, scale, (B, B)).bfloat16()
    sides = jobs(weight, untouched, codes.view(torch.uint8), scale)
    seconds: dict[str, dict[str, float]] = {job: {} for job in sides}
    for round_ in range(arguments.rounds + 1):
        for job, ways in sides.items():
            found = {}
            for side, way in ways.items():
                began = time.process_time()
                found[side] = way()
                spent = time.process_time() - began
                if round_:  # the first one touches the memory
                    seconds[job][side] = min(spent, seconds[job].get(side, spent))
            check(job, found)
    print(table(seconds, weight.numel()))
    ratios = {
        f"{job}_over_{side}": times[side] / times["kernel"]
        for job, times in seconds.items()
        for side in times
        if side != "kernel"
    }
    result = {**ratios, "seconds": seconds, **vars(arguments), "machine": machine(), "commit": commit()}
    print(json.dumps(result))


def jobs(
    weight: torch.Tensor, untouched: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
) -> dict[str, dict[str, Job]]:
    """Every way to do every job; those of the kernel write into memory that is there."""
    scratch = Scratch()
    values = torch.zeros_like(weight)
    written = {job: (torch.zeros_like(codes), torch.zeros_like(scale)) for job in ("quantise", "keep")}

    def decode() -> tuple[torch.Tensor]:
        dequantise_rows(codes, scale, values, scratch)
        return (values,)

    def encode(job: str, x: torch.Tensor, kept: torch.Tensor | None) -> Pair:
        quantise_rows(x, *written[job], scratch, kept=kept)
        return written[job]

    return {
        "dequantise": {
            "loop": lambda: (loop_dequantise(codes, scale),),
            "reference": lambda: (dequantise(codes.view(E4M3), scale, (B, B)).bfloat16(),),
            "kernel": decode,
        },
        "quantise": {
            "loop": lambda: loop_quantise(weight, None),
            "reference": lambda: reference_quantise(weight),
            "kernel": lambda: encode("quantise", weight, None),
        },
        "keep": {
            "loop": lambda: loop_quantise(untouched, scale),
            "kernel": lambda: encode("keep", untouched, scale),
        },
    }


def loop_dequantise(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As conversion scripts do it: the matrix in float32, then block by block."""
    values = codes.view(E4M3).float()
    out = torch.empty_like(values)
    for p in range(scale.shape[0]):
        for q in range(scale.shape[1]):
            place = (slice(p * B, p * B + B), slice(q * B, q * B + B))
            out[place] = values[place] * scale[p, q]
    return out.bfloat16()


def loop_quantise(x: torch.Tensor, kept: torch.Tensor | None) -> Pair:
    """Block by block; with the kept scale where it gives the block back."""
    codes = torch.empty(x.shape, dtype=E4M3)
    scale = torch.empty(-(-x.shape[0] // B), -(-x.shape[1] // B))
    for p in range(scale.shape[0]):
        for q in range(scale.shape[1]):
            place = (slice(p * B, p * B + B), slice(q * B, q * B + B))
            block = x[place].float()
            if kept is not None:
                found = (block / kept[p, q]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
                again = (found.float() * kept[p, q]).to(x.dtype)
                if torch.equal(again.view(torch.int16), x[place].contiguous().view(torch.int16)):
                    codes[place], scale[p, q] = found, kept[p, q]
                    continue
            scale[p, q] = block_scales(block.abs().max(), "fp32")
            codes[place] = (block / scale[p, q]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return codes.view(torch.uint8), scale


def reference_quantise(x: torch.Tensor) -> Pair:
    """`block_fp8.quantise` with the codes as bytes."""
    codes, scale = quantise(x, (B, B))
    return codes.view(torch.uint8), scale


def check(job: str, found: dict[str, tuple[torch.Tensor, ...]]) -> None:
    """All sides of a job gave the same bits."""
    for side, tensors in found.items():
        for one, other in zip(tensors, found["kernel"], strict=True):
            if not torch.equal(one, other):
                raise RuntimeError(f"{job}: {side} and kernel differ")


def table(seconds: dict[str, dict[str, float]], elements: int) -> str:
    """A Markdown table, one row a job and side; bytes are of the side that is read."""
    lines = ["| job | side | CPU seconds | GB read a CPU second | time over the kernel's |", "|---|---|---|---|---|"]
    for job, times in seconds.items():
        size = elements * (1 if job == "dequantise" else 2)
        for side, spent in times.items():
            cells = f"{spent:.4f} | {size / spent / 1e9:.2f} | {spent / times['kernel']:.1f}"
            lines.append(f"| {job} | {side} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
