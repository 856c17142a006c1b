"""Run a function in a world of small gloo processes and hand its results to the test.

A world's processes import Megatron once and then run every layout of the same size in turn; the groups of a layout
are destroyed before the next is built.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.cluster.local import free_port
from megatron_r1.config.model import ParallelConfig

ROOT = Path(__file__).resolve().parents[2]


def run_layouts(
    function: Callable[..., Any],
    layouts: Sequence[ParallelConfig],
    *arguments: Any,
    each: Sequence[tuple[Any, ...]] | None = None,
    timeout: float = 240,
) -> list[list[Any]]:
    """function(world, *each[i], *arguments) on every rank of each layout, which must have the same world size.

    Returns, for each layout, the results of its ranks in order.
    """
    sizes = {layout.world_size for layout in layouts}
    assert len(sizes) == 1, f"layouts of one call must have one world size, got {sizes}"
    ports = [free_port() for _ in layouts]
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.pickle"
        own = [()] * len(layouts) if each is None else each
        jobs = [(layout, port, (*mine, *arguments)) for layout, port, mine in zip(layouts, ports, own, strict=True)]
        job.write_bytes(pickle.dumps((function.__module__, function.__qualname__, jobs)))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "WORLD_SIZE": str(sizes.pop()),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        size = int(environment["WORLD_SIZE"])
        ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.dist.harness", str(job)],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]
        outputs = _wait(ranks, timeout)
        results = [job.with_suffix(f".{rank}") for rank in range(size)]
        failed = [f"--- rank {r}\n{text}" for r, text in enumerate(outputs) if not results[r].exists()]
        assert not failed, "\n".join(failed)
        found = [pickle.loads(path.read_bytes()) for path in results]
    return [[found[rank][i] for rank in range(size)] for i in range(len(layouts))]


def run_world(function: Callable[..., Any], layout: ParallelConfig, *arguments: Any, timeout: float = 240) -> list[Any]:
    """One layout: the results of its ranks in order."""
    return run_layouts(function, [layout], *arguments, timeout=timeout)[0]


def _wait(ranks: list[subprocess.Popen[str]], timeout: float) -> list[str]:
    try:
        return [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def _main(job: Path) -> None:
    import torch

    from megatron_r1.parallel import world as worlds

    torch.set_num_threads(1)
    module, name, jobs = pickle.loads(job.read_bytes())
    function = getattr(importlib.import_module(module), name)
    results = []
    for layout, port, arguments in jobs:
        os.environ["MASTER_PORT"] = str(port)
        world = worlds.start(layout, seed=1234, timeout_minutes=2)
        results.append(function(world, *arguments))
        del world
        worlds.stop()
    job.with_suffix(f".{os.environ['RANK']}").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
