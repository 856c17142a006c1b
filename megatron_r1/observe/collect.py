"""Reads a run directory into what the report shows; knows nothing of HTML.

Everything is optional: a run that has just begun, or of which a stage is missing, gives a smaller
view. The learning curve follows the last RL stage back to its first ancestor, so branches of a
recipe are never mixed into one line.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.observe.axes import Point
from megatron_r1.observe.charts import Series
from megatron_r1.observe.evaluations import (
    EvaluationTable,
    by_benchmark,
    closing_rows,
    evaluation_label,
    evaluation_table,
)
from megatron_r1.observe.lineage import read_config, stage_tables, weights_of_stages
from megatron_r1.observe.metrics import read_metrics
from megatron_r1.observe.rollouts import iterate_rollouts, rollout_files
from megatron_r1.observe.rundir import Departure, RunDir, StageDir, StageState

PHASES = 6
"""Rollout phases of a stage that the report shows completions of."""
EXAMPLES = 3
"""Best completions, and worst ones, shown of each such phase."""

Row = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Phase:
    """A rollout phase, or a benchmark's part of one, with its best and worst completions, at most one a prompt in each
    list.
    """

    step: int
    benchmark: str  # "" where none is named
    completions: int
    mean_reward: float
    best: list[Row]
    worst: list[Row]


@dataclass(kw_only=True, slots=True)
class StageView:
    """One stage: its state, metric lines and sampled completions."""

    state: StageState
    rows: list[Row]
    phases: list[Phase]

    def series(self, name: str) -> list[Point]:
        """[(step, value)] of a metric, of those lines that have it."""
        return [(float(row["step"]), float(row[name])) for row in self.rows if row.get(name) is not None]


@dataclass(kw_only=True, slots=True)
class Curve:
    """The learning curve over RL steps: shares of correct answers, and lengths of completions."""

    accuracy: list[Series] = field(default_factory=list)
    length: list[Series] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class RunView:
    """All that the report shows."""

    name: str
    stages: list[StageView]
    closing: list[Row]  # `observe/evaluations.py`
    evaluation: EvaluationTable | None
    departures: list[Departure]
    config_text: str
    curve: Curve


def collect(run_dir: Path) -> RunView:
    """Read a run. Raises UserError when `run_dir` is no run directory or one of its files is
    damaged.
    """
    run = RunDir.open(run_dir)
    config_text, config = read_config(run)
    stages = [_stage_view(state, run.stage(state.name)) for state in run.read_stages() or _guess_stages(run)]
    return RunView(
        name=str(config.get("name") or run.path.resolve().name),
        stages=stages,
        closing=closing_rows(run),
        evaluation=evaluation_table([view.state for view in stages]),
        departures=run.read_departures(),
        config_text=config_text,
        curve=learning_curve(stages, config),
    )


def _guess_stages(run: RunDir) -> list[StageState]:
    # a run copied without its stages.json still has curves worth showing
    found = sorted(run.path.glob("*/metrics.jsonl"))
    return [StageState(name=path.parent.name, kind="unknown", state="running") for path in found]


def _stage_view(state: StageState, folder: StageDir) -> StageView:
    files = rollout_files(folder.path)
    phases = [phase for step, path in evenly_spaced(files, PHASES) for phase in _phases(step, path)]
    return StageView(state=state, rows=read_metrics(folder.metrics), phases=phases)


def evenly_spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, the first and the last always among them, the others evenly
    between.
    """
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _phases(step: int, path: Path) -> list[Phase]:
    parts: dict[str, _Part] = {}
    for row in iterate_rollouts(path):
        parts.setdefault(str(row.get("benchmark", "")), _Part()).add(row)
    return [part.phase(step, benchmark) for benchmark, part in (parts or {"": _Part()}).items()]


class _Part:
    def __init__(self) -> None:
        self.best: dict[str, Row] = {}  # of each prompt, so that one easy prompt does not fill the list
        self.worst: dict[str, Row] = {}
        self.count, self.total = 0, 0.0

    def add(self, row: Row) -> None:
        self.count, self.total = self.count + 1, self.total + row["reward"]
        prompt = row["prompt_id"]
        if prompt not in self.best or row["reward"] > self.best[prompt]["reward"]:
            self.best[prompt] = row
        if prompt not in self.worst or row["reward"] < self.worst[prompt]["reward"]:
            self.worst[prompt] = row

    def phase(self, step: int, benchmark: str) -> Phase:
        return Phase(
            step=step,
            benchmark=benchmark,
            completions=self.count,
            mean_reward=self.total / self.count if self.count else math.nan,
            best=heapq.nlargest(EXAMPLES, self.best.values(), key=lambda row: row["reward"]),
            worst=heapq.nsmallest(EXAMPLES, self.worst.values(), key=lambda row: row["reward"]),
        )


def learning_curve(stages: Sequence[StageView], config: dict[str, Any]) -> Curve:
    """Accuracy and length over the RL steps that lead to the last RL stage, and the evaluations of
    those stages.

    x counts the optimizer steps of RL stages only, so an evaluation before RL stands at 0.
    """
    views = {view.state.name: view for view in stages}
    parents = _parents(list(views), config)
    trained = [view for view in stages if _is_rl(view)]
    chain: list[str] = []
    name = trained[-1].state.name if trained else (stages[-1].state.name if stages else None)
    while name is not None and name not in chain:
        chain.insert(0, name)
        name = parents.get(name)
    ends: dict[str, float] = {}
    drawn: dict[str, list[Point]] = {key: [] for key in ("reward/accuracy", "reward/majority", "rollout/length")}
    position = 0.0
    for name in chain:
        view = views[name]
        if _is_rl(view):
            for metric, points in drawn.items():
                points += [(position + step, value) for step, value in view.series(metric)]
            position += max([float(view.state.steps_done), *(float(row["step"]) for row in view.rows)])
        ends[name] = position
    curve = Curve()
    labels = (("training pass@1", "reward/accuracy"), ("training cons@G", "reward/majority"))
    curve.accuracy = [Series(name=label, points=drawn[key]) for label, key in labels if drawn[key]]
    if drawn["rollout/length"]:
        curve.length.append(Series(name="training", points=drawn["rollout/length"]))
    for view, end in _evaluations(stages, parents, ends):
        _add_evaluation(curve, view, end, _benchmark(view.state.name, stages, config))
    return curve


def _parents(names: Sequence[str], config: dict[str, Any]) -> dict[str, str | None]:
    # the stage whose weights a stage starts from; None: random weights or a folder elsewhere
    sources = weights_of_stages(config)
    return {name: source if (source := sources.get(name)) in names else None for name in names}


def _is_rl(view: StageView) -> bool:
    return view.state.kind == "grpo" or bool(view.series("reward/accuracy"))


def _evaluations(
    stages: Sequence[StageView], parents: dict[str, str | None], ends: dict[str, float]
) -> Iterator[tuple[StageView, float]]:
    evaluations = {view.state.name for view in stages if view.state.kind == "eval"}
    for view in stages:
        if view.state.name not in evaluations or not by_benchmark(view.state.result):
            continue
        source = parents[view.state.name]
        while source in evaluations:  # an evaluation hands the weights on unchanged
            source = parents[source]
        if source in ends:
            yield view, ends[source]


def _benchmark(name: str, stages: Sequence[StageView], config: dict[str, Any]) -> str:
    # "" when all evaluations with prompts of their own are on the same problems, else what tells them apart
    prompts = {name: table.get("prompts", {}) for name, table in stage_tables(config).items()}
    keys = {
        v.state.name: json.dumps(prompts.get(v.state.name, {}), sort_keys=True, default=str)
        for v in stages
        if v.state.kind == "eval" and None in by_benchmark(v.state.result)
    }
    distinct = list(dict.fromkeys(keys.values()))
    if name not in keys or len(distinct) < 2:
        return ""
    mine = prompts.get(name, {})
    title = str(mine.get("task") or Path(str(mine.get("path", "problems"))).stem)
    return f"{title} {distinct.index(keys[name]) + 1}"


def _add_evaluation(curve: Curve, view: StageView, end: float, problems: str) -> None:
    for i, (benchmark, result) in enumerate(by_benchmark(view.state.result).items()):
        suffix = f", {benchmark or problems}" if benchmark or problems else ""
        # Further benchmarks measure something else, e.g. safety, of which the majority vote says nothing.
        for metric in ("eval/pass_at_1", "eval/cons_at_k")[: 1 if i else 2]:
            if metric in result:
                label = f"held-out {evaluation_label(metric, result.get('eval/k'))}{suffix}"
                _append(curve.accuracy, label, (end, float(result[metric])))
        if "eval/length" in result and not i:
            _append(curve.length, f"held-out{suffix}", (end, float(result["eval/length"])))


def _append(series: list[Series], name: str, point: Point) -> None:
    for one in series:
        if one.name == name:
            one.points = sorted([*one.points, point])
            return
    series.append(Series(name=name, points=[point], marks=True))
