"""`megatron-r1 status RUN`: where a run stands, as a table, from the files of its directory alone.

Works while the run goes on, from another process or machine, and afterwards. Loads neither torch nor Megatron, and of
long metrics files reads only the end.
"""

from __future__ import annotations

import dataclasses
import math
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO

from megatron_r1.observe.evaluations import by_benchmark, evaluation_label
from megatron_r1.observe.lineage import read_config, stage_tables
from megatron_r1.observe.liveness import Holder, holder
from megatron_r1.observe.metrics import read_last_metrics
from megatron_r1.observe.names import for_benchmark, format_value, metric_of
from megatron_r1.observe.progress import Cell, duration, is_terminal, table
from megatron_r1.observe.rundir import RunDir, StageState

WINDOW = 64
"""Lines of metrics that the pace looks back on: steps get slower as completions get longer."""
SILENCE = 300.0
"""Seconds without a sign of life after which a run that may be dead is said to be silent (or five steps, if longer)."""

KEY_METRICS: dict[str, tuple[str, ...]] = {
    "pretrain": ("loss/lm",),
    "sft": ("loss/lm", "loss/heldout"),
    "distill": ("distill/reverse_kl",),
    "grpo": ("reward/accuracy", "reward/language", "policy/kl"),
    "reward_model": ("reward_model/accuracy", "reward_model/heldout_accuracy"),
    "sample": ("sample/accepted", "sample/rows"),
    "preferences": ("preferences/kept", "preferences/rows"),
    "mix": ("mix/rows", "mix/contaminated"),
    "export": ("export/tensors",),
}
"""Kind of stage -> metrics or entries of its result that say how it goes; those that it has not written are left out.
An evaluation shows the pass@1 of each problem set.
"""
_LABELS = {"loss/lm": "loss", "policy/kl": "KL", "distill/reverse_kl": "reverse KL", "loss/heldout": "held-out loss"}


@dataclass(kw_only=True, slots=True)
class StageStatus:
    """One stage as `status` shows it.

    state: as in stages.json, but "stopped" for one that was running when its run ended, and "stale" for one that has to
    run again. Steps are optimizer steps, or chunks, or completions of an evaluation.
    """

    name: str
    kind: str
    state: str
    steps_done: int = 0
    steps: int = 0  # 0: not known, or none
    elapsed: float | None = None  # seconds; of a resumed stage: since it was resumed
    eta: float | None = None  # seconds to go at the pace of the last steps
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""


class RunStatus(NamedTuple):
    """A run as `status` shows it."""

    name: str
    state: str  # "pending", "running", "stopped", "failed", "done"
    stages: list[StageStatus]


def read_status(run: RunDir, now: float | None = None) -> RunStatus:
    """Read a run. now: seconds since 1970, of this machine.

    Raises:
        UserError: a file of the run is damaged.
    """
    now = time.time() if now is None else now
    _, config = read_config(run)
    states = run.read_stages() or [
        StageState(name=name, kind=str(table.get("kind"))) for name, table in stage_tables(config).items()
    ]
    lock = holder(run)
    stages = [_stage_status(state, run, lock, now) for state in states]
    name = str(config.get("name") or run.path.resolve().name)
    return RunStatus(name, _run_state([stage.state for stage in stages], lock), stages)


def _run_state(states: Sequence[str], lock: Holder) -> str:
    if states and all(state == "done" for state in states):
        return "done"
    if lock.held or "running" in states:
        return "running"
    for state in ("failed", "stopped"):
        if state in states:
            return state
    return "stopped" if "done" in states or "stale" in states else "pending"


def _stage_status(state: StageState, run: RunDir, lock: Holder, now: float) -> StageStatus:
    shown = StageStatus(
        name=state.name,
        kind=state.kind,
        state="stale" if state.state == "pending" and state.why else state.state,
        steps_done=state.steps_done,
        steps=state.steps,
        note=state.why,
    )
    if state.state == "pending":
        return shown
    rows = read_last_metrics(run.stage(state.name).metrics)[-WINDOW:]
    shown.metrics = _key_metrics(state, rows)
    if state.state == "running":
        _look_at_running(shown, state, rows, lock, now, run)
    elif state.started is not None and state.finished is not None:
        shown.elapsed = max(0.0, state.finished - state.started)
    return shown


def _look_at_running(
    shown: StageStatus, state: StageState, rows: list[dict[str, Any]], lock: Holder, now: float, run: RunDir
) -> None:
    if rows:  # stages.json is some seconds behind
        shown.steps_done = max(state.steps_done, int(rows[-1]["step"]))
    began = now if state.started is None else state.started
    seen = max([began, *(row["time"] for row in rows[-1:] if "time" in row)], default=began)
    pace = _pace(state, rows, now)
    alive = _is_alive(lock, silent=now - _last_sign(run, state, seen), pace=pace)
    if alive is False:
        shown.state, shown.elapsed = "stopped", max(0.0, seen - began)
        return
    shown.elapsed = max(0.0, now - began)
    if pace is not None and shown.steps:
        since = max(0.0, now - seen) if rows else 0.0
        shown.eta = max(0.0, pace * (shown.steps - shown.steps_done) - since)
    if alive is None:
        note = f"no sign of life for {duration(now - _last_sign(run, state, seen))}"
        shown.note = f"{shown.note}; {note}" if shown.note else note


def _last_sign(run: RunDir, state: StageState, seen: float) -> float:
    folder = run.stage(state.name)
    files = (run.stages_file, folder.metrics, folder.rollouts, folder.checkpoints, folder.path)
    return max([seen, *(file.stat().st_mtime for file in files if file.exists())])


def _is_alive(lock: Holder, silent: float, pace: float | None) -> bool | None:
    """Whether the run works; None: it may."""
    if lock.held:
        return True
    if lock.held is False and lock.host == socket.gethostname():
        return False
    # Another machine took the lock, and this file system may keep locks of each machine to itself.
    long_ago = silent > max(SILENCE, 5 * (pace or 0.0))
    return (False if lock.held is False else None) if long_ago else True


def _pace(state: StageState, rows: list[dict[str, Any]], now: float) -> float | None:
    """Seconds a step, everything included; None where nothing tells."""
    own = [row for row in rows if "time" in row and row["time"] >= (state.started or 0.0)]  # of this attempt
    if len(own) > 1 and own[-1]["step"] > own[0]["step"]:
        return float(own[-1]["time"] - own[0]["time"]) / (own[-1]["step"] - own[0]["step"])
    steps = [float(row["time/step"]) for row in rows if math.isfinite(row.get("time/step") or math.nan)]
    if steps:
        return sum(steps) / len(steps)
    if not rows and state.steps_done and state.started is not None:  # an evaluation: it counts from 0 at each start
        return max(0.0, now - state.started) / state.steps_done
    return None


def _key_metrics(state: StageState, rows: list[dict[str, Any]]) -> dict[str, float]:
    if state.kind == "eval":
        sets = by_benchmark(state.result)
        return {for_benchmark(n, b): sets[b][n] for b in sets for n in ("eval/pass_at_1",) if n in sets[b]}
    last = {name: value for row in rows for name, value in row.items() if isinstance(value, (int, float))}
    numbers = {
        n: v for n, v in (last | state.result).items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    return {name: float(numbers[name]) for name in KEY_METRICS.get(state.kind, ()) if name in numbers}


def status_table(status: RunStatus) -> tuple[str, list[str], list[list[Cell]]]:
    """(title, columns, rows) of the table that people see; notes have a column where there is one."""
    noted = any(stage.note for stage in status.stages)
    rows: list[list[Cell]] = []
    for stage in status.stages:
        steps = f"{stage.steps_done}/{stage.steps}" if stage.steps else "-"
        cells = [stage.name, stage.kind, stage.state, steps, _time(stage.elapsed), _time(stage.eta), _metrics(stage)]
        rows.append([*cells, stage.note] if noted else [*cells])
    done = sum(stage.state == "done" for stage in status.stages)
    title = f"{status.name}: {status.state}, {done} of {len(status.stages)} stages done"
    return title, ["stage", "kind", "state", "steps", "elapsed", "eta", "result", *(["note"] if noted else [])], rows


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def _metrics(stage: StageStatus) -> str:
    parts = []
    for name, value in stage.metrics.items():
        metric = metric_of(name)
        label = _LABELS.get(name) or evaluation_label(name, None).rpartition("/")[2].replace("_", " ")
        parts.append(f"{label} {format_value(value, metric.unit if metric else 'count')}")
    return ", ".join(parts) or "-"


def print_status(status: RunStatus, stream: TextIO | None = None) -> None:
    """Print the table of a run."""
    table(*status_table(status), stream, words=("kind", "state", "result", "note"))


def watch(run: RunDir, seconds: float, stream: TextIO | None = None) -> RunStatus:
    """Print the table again and again, in place on a terminal, until the run is done, failed or stopped.

    Raises:
        UserError: a file of the run is damaged.
    """
    out = stream or sys.stdout
    while True:
        status = read_status(run)
        if is_terminal(out):
            out.write("\x1b[H\x1b[2J")  # to the top left, and clear
        print_status(status, out)
        if status.state in ("done", "failed", "stopped"):
            return status
        time.sleep(seconds)


def status_json(status: RunStatus) -> dict[str, Any]:
    """The same for programs: seconds, shares from 0 to 1; a value that is not finite is None."""
    stages = [dataclasses.asdict(stage) for stage in status.stages]
    for stage in stages:
        stage["metrics"] = {n: v if math.isfinite(v) else None for n, v in stage["metrics"].items()}
    return {"run": status.name, "state": status.state, "stages": stages}
