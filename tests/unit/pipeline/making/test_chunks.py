"""Metrics of a stage in chunks that was killed between a chunk's file and its line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_r1.observe.metrics import MetricsWriter, read_metrics
from megatron_r1.observe.rundir import RunDir, StageState
from megatron_r1.pipeline.making.chunks import _Output


def metrics(done: list[dict[str, Any]]) -> dict[str, float]:
    return {"sample/rows": float(done[-1]["rows"])}


def test_lines_that_a_kill_has_cost_are_written_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_stages([StageState(name="cold", kind="sample", state="running")])
    context: Any = SimpleNamespace(run=run, attempt=2, world=SimpleNamespace(rank=0))
    with MetricsWriter(tmp_path / "cold") as writer:
        writer.write(1, metrics([{"rows": 10}]))
    done = [{"rows": 10}, {"rows": 20}, {"rows": 30}]
    with _Output("cold", context, done, 5, metrics) as output:
        (state,) = run.read_stages()
        assert (state.steps, state.steps_done) == (5, 3)
        done.append({"rows": 40})
        output.write(done)
    found = [(row["step"], row["sample/rows"]) for row in read_metrics(tmp_path / "cold" / "metrics.jsonl")]
    assert found == [(1, 10), (2, 20), (3, 30), (4, 40)]
    assert run.read_stages()[0].steps_done == 4
    with _Output("cold", context, done[:2], 5, metrics):  # a line of a chunk that is not there
        pass
    assert [row["step"] for row in read_metrics(tmp_path / "cold" / "metrics.jsonl")] == [1, 2]
