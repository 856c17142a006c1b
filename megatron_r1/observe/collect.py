"""Reads a run directory into what the report shows; knows nothing of HTML.

Everything is optional: a run that has just begun, or of which a stage is missing, gives a smaller
view. The learning curve follows the last RL stage back to its first ancestor, so branches of a
recipe are never mixed into one line.
"""

from __future__ import annotations

import heapq
import json
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.observe.axes import Point
from megatron_r1.observe.charts import Series
from megatron_r1.observe.metrics import read_metrics
from megatron_r1.observe.names import METRICS, Metric, format_value, language_of
from megatron_r1.observe.rollouts import iterate_rollouts, rollout_files
from megatron_r1.observe.rundir import Departure, RunDir, StageDir, StageState

PHASES = 6
"""Rollout phases of a stage that the report shows completions of."""
EXAMPLES = 3
"""Best completions, and worst ones, shown of each such phase."""

Row = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Phase:
    """A rollout phase with its best and worst completions, at most one a prompt in each list."""

    step: int
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
class EvaluationTable:
    """What the eval stages measured, as text."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(kw_only=True, slots=True)
class RunView:
    """All that the report shows."""

    name: str
    stages: list[StageView]
    evaluation: EvaluationTable | None
    departures: list[Departure]
    config_text: str
    curve: Curve


def collect(run_dir: Path) -> RunView:
    """Read a run. Raises UserError when `run_dir` is no run directory or one of its files is
    damaged.
    """
    run = RunDir.open(run_dir)
    config_text, config = _read_config(run)
    stages = [_stage_view(state, run.stage(state.name)) for state in run.read_stages() or _guess_stages(run)]
    return RunView(
        name=str(config.get("name") or run.path.resolve().name),
        stages=stages,
        evaluation=evaluation_table([view.state for view in stages]),
        departures=run.read_departures(),
        config_text=config_text,
        curve=learning_curve(stages, config),
    )


def _read_config(run: RunDir) -> tuple[str, dict[str, Any]]:
    path = run.resolved if run.resolved.exists() else run.recipe
    if not path.exists():
        return "", {}
    text = path.read_text(encoding="utf-8")
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML ({error}); mend the file or start the run anew") from error


def _guess_stages(run: RunDir) -> list[StageState]:
    # a run copied without its stages.json still has curves worth showing
    found = sorted(run.path.glob("*/metrics.jsonl"))
    return [StageState(name=path.parent.name, kind="unknown", state="running") for path in found]


def _stage_view(state: StageState, folder: StageDir) -> StageView:
    files = rollout_files(folder.path)
    phases = [_phase(step, path) for step, path in evenly_spaced(files, PHASES)]
    return StageView(state=state, rows=read_metrics(folder.metrics), phases=phases)


def evenly_spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, the first and the last always among them, the others evenly
    between.
    """
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _phase(step: int, path: Path) -> Phase:
    best: dict[str, Row] = {}  # of each prompt, so that one easy prompt does not fill the list
    worst: dict[str, Row] = {}
    count, total = 0, 0.0
    for row in iterate_rollouts(path):
        count, total = count + 1, total + row["reward"]
        prompt = row["prompt_id"]
        if prompt not in best or row["reward"] > best[prompt]["reward"]:
            best[prompt] = row
        if prompt not in worst or row["reward"] < worst[prompt]["reward"]:
            worst[prompt] = row
    return Phase(
        step=step,
        completions=count,
        mean_reward=total / count if count else math.nan,
        best=heapq.nlargest(EXAMPLES, best.values(), key=lambda row: row["reward"]),
        worst=heapq.nsmallest(EXAMPLES, worst.values(), key=lambda row: row["reward"]),
    )


def evaluation_table(states: Sequence[StageState]) -> EvaluationTable | None:
    """A column for each eval stage that has a result and a row for each metric; None without any."""
    done = [state for state in states if any(name.startswith("eval/") for name in state.result)]
    if not done:
        return None
    rows: list[list[str]] = []
    for name, metric in _evaluation_metrics(done).items():
        values = [state.result.get(name) for state in done]
        label = evaluation_label(name, done[0].result.get("eval/k"))
        rows.append([label, *("-" if v is None else format_value(float(v), metric.unit) for v in values)])
    return EvaluationTable(columns=["", *(state.name for state in done)], rows=rows)


def _evaluation_metrics(states: Sequence[StageState]) -> dict[str, Metric]:
    # in the order of METRICS, each language after the mean over all
    written = sorted({name for state in states for name, value in state.result.items() if value is not None})
    found: dict[str, Metric] = {}
    for metric, meaning in METRICS.items():
        if metric.startswith("eval/"):
            found |= {name: meaning for name in written if name == metric}
            found |= {name: meaning for name in written if language_of(name) and name.rpartition("/")[0] == metric}
    return found


def evaluation_label(name: str, k: float | None) -> str:
    """What people call an eval metric: ("eval/cons_at_k", 16) -> "cons@16", ("eval/pass_at_1", 16)
    -> "pass@1", ("eval/language/zh", 16) -> "language zh".
    """
    if not name.startswith("eval/"):
        return name
    what = name.removeprefix("eval/")
    shown = "k" if k is None else f"{k:g}"
    named = {"pass_at_1": "pass@1", "cons_at_k": f"cons@{shown}", "pass_at_k": f"pass@{shown}"}
    return named.get(what, "samples a problem" if what == "k" else re.sub("[_/]", " ", what))


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


def _is_rl(view: StageView) -> bool:
    return view.state.kind == "grpo" or bool(view.series("reward/accuracy"))


def _parents(names: Sequence[str], config: dict[str, Any]) -> dict[str, str | None]:
    # the stage whose weights a stage starts from; None: random weights or a folder elsewhere
    tables = {table.get("name"): table for table in config.get("stage", [])}
    parents: dict[str, str | None] = {}
    for i, name in enumerate(names):
        table = tables.get(name, {})
        source = table.get("from", table.get("init_from"))
        parents[name] = (names[i - 1] if i else None) if source is None else (source if source in names else None)
    return parents


def _evaluations(
    stages: Sequence[StageView], parents: dict[str, str | None], ends: dict[str, float]
) -> Iterator[tuple[StageView, float]]:
    evaluations = {view.state.name for view in stages if view.state.kind == "eval"}
    for view in stages:
        if view.state.name not in evaluations or "eval/pass_at_1" not in view.state.result:
            continue
        source = parents[view.state.name]
        while source in evaluations:  # an evaluation hands the weights on unchanged
            source = parents[source]
        if source in ends:
            yield view, ends[source]


def _benchmark(name: str, stages: Sequence[StageView], config: dict[str, Any]) -> str:
    # "" when all evaluations are on the same problems, else what tells them apart
    prompts = {table.get("name"): table.get("prompts", {}) for table in config.get("stage", [])}
    keys = {
        v.state.name: json.dumps(prompts.get(v.state.name, {}), sort_keys=True, default=str)
        for v in stages
        if v.state.kind == "eval"
    }
    distinct = list(dict.fromkeys(keys.values()))
    if len(distinct) < 2:
        return ""
    mine = prompts.get(name, {})
    title = str(mine.get("task") or Path(str(mine.get("path", "problems"))).stem)
    return f"{title} {distinct.index(keys[name]) + 1}"


def _add_evaluation(curve: Curve, view: StageView, end: float, benchmark: str) -> None:
    result = view.state.result
    suffix = f", {benchmark}" if benchmark else ""
    for metric in ("eval/pass_at_1", "eval/cons_at_k"):
        if result.get(metric) is not None:
            label = f"held-out {evaluation_label(metric, result.get('eval/k'))}{suffix}"
            _append(curve.accuracy, label, (end, float(result[metric])))
    if result.get("eval/length") is not None:
        _append(curve.length, f"held-out{suffix}", (end, float(result["eval/length"])))


def _append(series: list[Series], name: str, point: Point) -> None:
    for one in series:
        if one.name == name:
            one.points = sorted([*one.points, point])
            return
    series.append(Series(name=name, points=[point], marks=True))
