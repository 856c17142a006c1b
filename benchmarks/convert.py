"""The checkpoint converter against a plain copy of what it writes, its memory, its kernels and its planning.

    python benchmarks/convert.py
    python benchmarks/convert.py --rounds 7 --gb 1 --work /scratch/me

Makes DeepSeek-V3's FP8 checkpoint with one layer of few experts and a small vocabulary: tensors of the real sizes, of
one repeated block of random bytes, since no job's time depends on their values. --gb are the sizes of its BF16 form.
Jobs, the command line each, in a process of its own, on one worker: `cast to bf16` and `cast to fp8` between Hugging
Face folders, `import` of the BF16 one to torch_dist and `export` from there. Beside each job runs `copy`, a process
that copies the files that the job wrote (shutil.copyfile). Both sides bring their bytes onto the disk (fsync).
Inputs are in the page cache when they fit.

Jobs and copies run in turn, --rounds times for each size; the smallest processor
time (user + system) of each counts. `net` is without imports: a process takes the time before and after. Peak memory is
VmHWM of the process, all that it has resident; beyond what the imports took it should be at most 64 MiB plus three
times the FP8 bytes of the largest tensor that is transformed.

Then, once: the kernels against the loop over blocks (fp8_kernels.py), and planning DeepSeek-V3 in full: `convert
inspect`, and the hashes of its plans, which --resume compares. Prints tables, then one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from machine import ROOT, commit, machine

from megatron_r1.convert.correspondence import Correspondence
from megatron_r1.convert.formats.hf_files import INDEX, SINGLE, index_json, shard_layout
from megatron_r1.convert.inspecting import planned_hf
from megatron_r1.model.presets import load_architecture

PRESET = ROOT / "megatron_r1" / "model" / "presets" / "deepseek-v3.json"
SHARD_BYTES = 500 * 10**6
JOBS: dict[str, tuple[str, ...]] = {  # what follows `megatron-r1 convert`, run in the work folder
    "cast to bf16": ("cast", "fp8", "bf16", "--dtype", "bf16"),
    "cast to fp8": ("cast", "bf16", "fp8-again", "--dtype", "fp8"),
    "import": ("import", "bf16", "megatron"),
    "export": ("export", "megatron", "bf16-again"),
}
GOALS = {"cast to bf16": 0.35, "import": 0.35, "export": 0.6}  # of the copy, per processor second, net
# What a process does before the clock starts, `import ...`, and what it then does; the import job pickles with torch.
CONVERT = (
    "from megatron_r1.cli import main; import megatron_r1.convert.conversion, megatron_r1.convert.write, "
    "megatron_r1.observe.progress, megatron_r1.convert.inspecting, megatron_r1.convert.plan_text",
    "status = main(sys.argv[1:])",
)
IMPORT = (f"{CONVERT[0]}; import torch.distributed.checkpoint.filesystem", CONVERT[1])
COPY = (
    "import os, shutil",
    """
status = 0
for root, _, names in os.walk(sys.argv[1]):
    folder = os.path.join(sys.argv[2], os.path.relpath(root, sys.argv[1]))
    os.makedirs(folder, exist_ok=True)
    for name in names:
        shutil.copyfile(os.path.join(root, name), os.path.join(folder, name))
        with open(os.path.join(folder, name), "rb") as file:
            os.fsync(file.fileno())""",
)
HASH = (
    "import megatron_r1.convert.write",
    f"""
from pathlib import Path
from megatron_r1.convert.correspondence import Correspondence
from megatron_r1.convert.importing import import_plan
from megatron_r1.convert.inspecting import planned_hf
from megatron_r1.convert.plan import HfSource
from megatron_r1.model.presets import load_architecture
table = Correspondence(load_architecture(Path({str(PRESET)!r})))
plan = import_plan(HfSource(planned_hf(table, "fp8"), table), spec="te", dtype=None, file_bytes=5 * 10**9).plan
before = measured()
for file in plan.files:
    megatron_r1.convert.write.plan_hash(file, lambda source: "as it is")
status = 0""",
)
CHILD = """
import json, resource, shutil, sys
def measured():
    spent = resource.getrusage(resource.RUSAGE_SELF)
    peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
    return spent.ru_utime + spent.ru_stime, int(peak) / 1024
{}
# Just before the clock starts, on both sides: seconds later the host of a virtual machine has taken free memory back.
shutil.rmtree({!r}, ignore_errors=True)
before = measured()
{}
after = measured()
print(json.dumps({{"net": after[0] - before[0], "floor_mib": before[1], "peak_mib": after[1]}}))
sys.exit(status)
"""
Measured = dict[str, float]


def main() -> None:
    """Measure everything and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gb", type=float, nargs="+", default=[1.0, 4.0], help="sizes of the model in BF16")
    parser.add_argument("--work", type=Path, help="folder for five times that size (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        if not arguments.json:
            print(text, flush=True)

    say(f"{machine()}; commit {commit()}; load {load()}")
    sizes: dict[str, Any] = {}
    for gigabytes in arguments.gb:
        with tempfile.TemporaryDirectory(dir=arguments.work, prefix="convert-") as folder:
            sizes[f"{gigabytes:g}"] = one_size(Path(folder), gigabytes, arguments.rounds)
        say(table(gigabytes, sizes[f"{gigabytes:g}"]))
    kernels = kernel_ratios(arguments.rounds)
    say(f"kernel over loop: {', '.join(f'{job} {ratio:.1f}' for job, ratio in kernels.items())}; goal 10 to dequantise")
    planned = planning()
    say(
        "DeepSeek-V3 planned both ways: {seconds:.1f} s, {cpu:.1f} CPU s, {peak_mib:.0f} MiB (goal 60 s, 1,536 MiB); "
        "hashes of its import {hash_seconds:.2f} CPU s".format(**planned)
    )
    result = {"sizes": sizes, "kernel_over_loop": kernels, "planning": planned, "load_after": load()}
    print(json.dumps({**result, "rounds": arguments.rounds, "machine": machine(), "commit": commit()}))


def one_size(folder: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    """Everything measured on a model of this size."""
    largest = build(folder / "fp8", gigabytes)
    found: dict[str, list[Measured]] = {}

    def take(side: str, target: str, code: tuple[str, str], *arguments: str) -> None:
        found.setdefault(side, []).append(in_child(code, arguments, folder, target))

    for _ in range(rounds):
        for job, words in JOBS.items():
            take(job, words[2], IMPORT if job == "import" else CONVERT, "convert", *words)
            take(f"copy of {job}", "copy", COPY, words[2], "copy")
    jobs = {}
    for job, words in JOBS.items():
        written = sum(file.stat().st_size for file in (folder / words[2]).rglob("*") if file.is_file()) / 1e9
        runs = found[job]
        ours, copy = (
            {name: min(run[name] for run in found[side]) for name in ("net", "cpu", "wall")}
            for side in (job, f"copy of {job}")
        )
        jobs[job] = {
            **{f"{name}_ratio": copy[name] / ours[name] for name in ours},
            **{f"{name}_seconds": ours[name] for name in ours},
            **{f"copy_{name}_seconds": copy[name] for name in ours},
            **{"gb_written": written, "floor_mib": min(run["floor_mib"] for run in runs)},
            "peak_mib": max(run["peak_mib"] for run in runs),
            "extra_mib": max(run["peak_mib"] - run["floor_mib"] for run in runs),
            "bound_mib": 64 + 3 * largest / 2**20,
        }
    return {"jobs": jobs, "largest_mib": largest / 2**20, "all": found}


def build(folder: Path, gigabytes: float) -> int:
    """Write the FP8 checkpoint; returns the bytes of its largest FP8 tensor."""
    config = json.loads(PRESET.read_text(encoding="utf-8"))
    config |= {"vocab_size": 1024, "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    config |= {"torch_dtype": "bfloat16", "n_routed_experts": 8, "n_group": 1, "topk_group": 1}
    config["quantization_config"] = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    config["quantization_config"]["weight_block_size"] = [128, 128]
    folder.mkdir()
    expert = 3 * 2 * config["hidden_size"] * config["moe_intermediate_size"]
    missing = gigabytes * 1e9 - sum(2 * prod(shape) for _, _, shape in tensors(folder, config))
    config["n_routed_experts"] = max(8, 8 + round(missing / expert))
    listed = tensors(folder, config)
    blocks = random_blocks(np.random.default_rng(0))
    shards = shard_layout(listed, SHARD_BYTES, None)
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            for tensor in shard.tensors:
                for start in range(0, tensor.bytes, len(blocks[tensor.dtype])):
                    file.write(blocks[tensor.dtype][: tensor.bytes - start])
    if [shard.name for shard in shards] != [SINGLE]:
        (folder / INDEX).write_bytes(index_json(shards))
    return max(prod(shape) for _, dtype, shape in listed if dtype == "F8_E4M3")


def tensors(folder: Path, config: Mapping[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor of such a model, whose config.json is written."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    archive = planned_hf(Correspondence(load_architecture(folder)), "fp8")
    return [(tensor.name, tensor.dtype, tensor.shape) for tensor in archive.tensors.values()]


def random_blocks(draw: np.random.Generator) -> dict[str, memoryview]:
    """dtype -> the bytes that its tensors repeat: E4M3 codes but NaN, scales around 1e-4, BF16 weights."""
    codes = draw.integers(0, 256, 8 << 20, dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    scales = draw.uniform(1e-4, 2e-4, 1 << 16).astype(np.float32)
    weights = (draw.standard_normal(1 << 20, dtype=np.float32) * 0.02).view(np.uint16)[1::2].copy()
    made = {"F8_E4M3": codes, "F32": scales, "BF16": weights}
    return {dtype: memoryview(block.view(np.uint8)) for dtype, block in made.items()}


def in_child(code: tuple[str, str], arguments: Sequence[str] = (), folder: Path = ROOT, target: str = "") -> Measured:
    """What a fresh process measures of itself, and its processor and wall seconds from start to end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began, before = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(code[0], target, code[1]), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    wall, after = time.perf_counter() - began, os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return {**json.loads(done.stdout.splitlines()[-1]), "cpu": spent, "wall": wall}


def kernel_ratios(rounds: int) -> dict[str, float]:
    """How many times as fast as the loop over blocks the kernels are, by processor time."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "fp8_kernels.py"), "--rounds", str(rounds)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {job: found[f"{job}_over_loop"] for job in ("dequantise", "quantise", "keep")}


def planning() -> dict[str, float]:
    """Planning DeepSeek-V3 both ways from its config, and the hashes of the import."""
    run = in_child(CONVERT, ("convert", "inspect", "--preset", "deepseek-v3", "--dtype", "fp8", "--json"))
    hashed = in_child(HASH)
    return {
        **{"seconds": run["wall"], "cpu": run["cpu"], "peak_mib": run["peak_mib"]},
        **{"hash_seconds": hashed["net"], "hash_peak_mib": hashed["peak_mib"]},
    }


def load() -> str:
    """The machine's load averages."""
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def table(gigabytes: float, size: Mapping[str, Any]) -> str:
    """A Markdown table, one row a job."""
    lines = [
        f"{gigabytes:g} GB in BF16, largest transformed tensor {size['largest_mib']:.0f} MiB",
        "| job | GB written | CPU s net | copy's | net, copy/job (goal) | whole | wall | MiB over imports (bound) |",
        "|---" * 8 + "|",
    ]
    for job, row in size["jobs"].items():
        goal = f" ({GOALS[job]})" if job in GOALS else ""
        cells = [
            *(f"{row[name]:.2f}" for name in ("gb_written", "net_seconds", "copy_net_seconds")),
            f"{row['net_ratio']:.2f}{goal}",
            *(f"{row[name]:.2f}" for name in ("cpu_ratio", "wall_ratio")),
            f"{row['extra_mib']:.0f} over {row['floor_mib']:.0f} ({row['bound_mib']:.0f})",
        ]
        lines.append(f"| {job} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
