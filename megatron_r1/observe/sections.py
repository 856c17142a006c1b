"""The sections of the report as HTML text; `observe/report.py` puts them into the page.

Each function gives the inside of one section, or "" when the run has nothing for it. Everything
that comes from the run passes `escape`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence

from megatron_r1.observe.collect import Phase, Row, RunView, StageView
from megatron_r1.observe.evaluations import by_benchmark, closing_text, evaluation_label, samples_of
from megatron_r1.observe.lineage import LANGUAGE_MODEL_KINDS
from megatron_r1.observe.markup import badge, element, escape, note, table
from megatron_r1.observe.names import METRICS, format_value, metric_of
from megatron_r1.observe.panels import PANELS, curve_charts, stage_charts
from megatron_r1.observe.progress import cell_text, duration
from megatron_r1.observe.rundir import Departure, StageState

MAX_TEXT = 6000
"""Characters shown of a completion; the middle of a longer one is left out, and the page says
so.
"""


def run_state(view: RunView) -> str:
    """pending, running, done or failed; a run with a stage still to come is running."""
    states = [stage.state.state for stage in view.stages]
    if "failed" in states:
        return "failed"
    if not states or all(state == "pending" for state in states):
        return "pending"
    return "done" if all(state == "done" for state in states) else "running"


def unfinished_note(view: RunView) -> str:
    """Says that the page is a snapshot, for a run that goes on."""
    if run_state(view) in ("done", "failed"):
        return ""
    return note("The run was not finished then; write the report again for newer numbers.")


def summary(view: RunView) -> str:
    """Tiles with the main facts, and the before/after tables."""
    facts = dict(_derived_facts(view))
    tiles = [
        element("div", escape(value), "value") + element("div", escape(label), "what") for label, value in facts.items()
    ]
    blocks = [element("div", "".join(element("div", tile, "tile") for tile in tiles), "tiles")]
    if view.evaluation is not None:
        blocks.append(element("h3", "Held-out evaluation"))
        if view.closing:
            title, columns, rows = closing_text(view.closing)
            blocks.append(note(escape(title)) + _text_table(columns, rows))
        full = _text_table(view.evaluation.columns, view.evaluation.rows)
        # Several stages and benchmarks make a wide table: folded beside the closing one.
        blocks.append(element("details", element("summary", "Everything measured") + full) if view.closing else full)
    return "".join(blocks) if tiles or view.evaluation is not None else ""


def _text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table([escape(column) for column in columns], [[escape(cell) for cell in row] for row in rows], "numbers")


_RECENT = 10


def _derived_facts(view: RunView) -> list[tuple[str, str]]:
    def finite(name: str) -> list[float]:
        return [v for stage in view.stages for _, v in stage.series(name) if math.isfinite(v)]

    facts = []
    for name, label in (
        ("reward/accuracy", "training accuracy"),
        ("rollout/length", "tokens a completion"),
    ):
        recent = finite(name)[-_RECENT:]
        if recent:
            mean = sum(recent) / len(recent)
            value = format_value(mean, METRICS[name].unit)
            facts.append((f"{label}, last {len(recent)} phases", value))
    sampled = sum(finite("rollout/tokens"))
    if sampled:
        facts.append(("tokens sampled", format_value(sampled, "tokens")))
    trained = (*LANGUAGE_MODEL_KINDS, "reward_model")
    steps = sum(stage.state.steps_done for stage in view.stages if stage.state.kind in trained)
    if steps:
        facts.append(("optimizer steps", format_value(steps, "count")))
    seconds = sum(_seconds(stage) or 0.0 for stage in view.stages)
    if seconds:
        facts.append(("time in stages", duration(seconds)))
    return facts


def _seconds(stage: StageView) -> float | None:
    # of a stage that still runs, or was killed: up to its last line of metrics
    began, ended = stage.state.started, stage.state.finished
    if ended is None and stage.rows:
        ended = stage.rows[-1].get("time")
    return None if began is None or ended is None else max(0.0, ended - began)


def learning_curve(view: RunView) -> str:
    """The figure of the paper: accuracy and response length over RL steps."""
    charts = curve_charts(view.curve, hover=True)
    if not charts:
        return ""
    text = (
        "Solid lines: prompts trained on, smoothed over the faint raw values. Dots: evaluations on held-out problems."
    )
    return note(text) + element("div", _figures(charts), "charts wide")


def _figures(charts: Sequence[str]) -> str:
    return "".join(element("figure", chart, "card") for chart in charts)


def stage_table(view: RunView) -> str:
    """State, steps, time and result of every stage."""
    if not view.stages:
        return note("No stage has begun.")
    rows = []
    for stage in view.stages:
        state = stage.state
        began = "-"
        if state.started is not None:
            began = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.started))
        rows.append(
            [
                escape(state.name),
                escape(state.kind),
                badge(state.state),
                f"{state.steps_done} / {state.steps}" if state.steps else "-",
                began,
                duration(_seconds(stage)),
                element("div", escape(_result(state)), "wrap"),
            ]
        )
    return table(["stage", "kind", "state", "steps", "started", "time", "result"], rows)


def _result(state: StageState) -> str:
    """What a stage says of itself; of an evaluation on several benchmarks only pass@1: the whole has a table above."""
    result = state.result
    if state.kind == "eval" and len(by_benchmark(result)) > 1:
        result = {name: value for name, value in result.items() if name.endswith("/pass_at_1")}
    parts = []
    for name, value in result.items():
        label = evaluation_label(name, samples_of(name, state.result))
        if (metric := metric_of(name)) is not None and isinstance(value, (int, float)):
            parts.append(f"{label} {format_value(float(value), metric.unit)}")
        elif isinstance(value, dict):
            counts = ", ".join(f"{key} {count}" for key, count in value.items())
            parts.append(f"{label} ({counts})")
        else:
            parts.append(f"{label} {cell_text(value) if isinstance(value, float) else value}")
    return ", ".join(parts)


def stage_plots(stage: StageView) -> str:
    """All charts of one stage."""
    charts = stage_charts(stage)
    if not charts:
        return ""
    shown = {name for panel in PANELS for name in panel.metrics}
    odd = sum(not math.isfinite(v) for name in shown for _, v in stage.series(name))
    text = f"{odd} values were not finite: the red ticks on the step axes." if odd else ""
    return (note(text) if odd else "") + element("div", _figures(charts), "charts")


def completions(view: RunView) -> str:
    """Browser of sampled completions: a row of steps, and the best and worst of the chosen one."""
    blocks = []
    for i, stage in enumerate(view.stages):
        if not stage.phases:
            continue
        buttons = "".join(
            f'<button type="button" data-stage="{i}" data-step="{_phase_key(p)}">{_phase_key(p)}</button>'
            for p in stage.phases
        )
        blocks.append(element("h3", escape(stage.state.name)))
        what = "benchmark" if any(phase.benchmark for phase in stage.phases) else "step"
        blocks.append(element("div", f"<span>{what}</span>{buttons}", "steps"))
        blocks += [_phase(i, phase) for phase in stage.phases]
    return "".join(blocks)


def _phase_key(phase: Phase) -> str:
    return escape(phase.benchmark or phase.step)


def _phase(stage: int, phase: Phase) -> str:
    columns = "".join(
        element("div", element("h4", title) + "".join(_card(row) for row in rows))
        for title, rows in (("Highest reward", phase.best), ("Lowest reward", phase.worst))
    )
    where = f"Benchmark {escape(phase.benchmark)}" if phase.benchmark else f"Step {phase.step}"
    head = f"{where}: {phase.completions} completions, mean reward {phase.mean_reward:.3f}"
    place = f'<div class="phase" data-stage="{stage}" data-step="{_phase_key(phase)}">'
    return f"{place}{note(head)}{element('div', columns, 'pair')}</div>"


_ENDED = {"stop": "ended by itself", "length": "cut at the length limit", "abort": "aborted"}


def _card(row: Row) -> str:
    parts = " + ".join(f"{name} {value:g}" for name, value in row["reward_parts"].items())
    head = badge(str(row["verdict"])) + element("b", f"reward {row['reward']:g}")
    if parts:
        head += element("span", escape(f"= {parts}"), "note")
    answers = [
        ("reference", row["answer"]),
        ("read as", row["extracted"]),
        ("verdict", row["verdict_detail"]),
    ]
    known = [f"{label} {element('b', escape(value))}" for label, value in answers if value]
    facts = [f"{row['tokens']} tokens", _ENDED.get(row["finish_reason"], "")]
    if row["advantage"] is not None:
        facts.append(f"advantage {row['advantage']:+.2f}")
    versions = dict.fromkeys(str(version) for version in row["weight_versions"])
    facts.append(f"weights of version {' to '.join(versions)}")
    foot = "".join(element("span", text) for text in [*known, escape(", ".join(facts))])
    body = (
        element("header", head)
        + element("div", escape(row["question"]), "question")
        + element("pre", completion_html(row["text"]))
        + element("footer", foot)
    )
    return element("article", body, "card completion")


_TAG = re.compile(r"&lt;/?(?:think|answer)&gt;")


def completion_html(text: str) -> str:
    """A completion, escaped, cut to MAX_TEXT characters, its think and answer tags coloured."""
    if len(text) > MAX_TEXT:
        half = MAX_TEXT // 2
        gap = f"\n\n[... {len(text) - 2 * half:,} characters left out ...]\n\n"
        text = text[:half] + gap + text[-half:]
    return _TAG.sub(lambda match: element("span", match.group(), "tag"), escape(text))


def departures(items: Sequence[Departure]) -> str:
    """Table of the keys in which the run departs from the paper."""
    rows = [
        [
            element("code", escape(item.key)),
            escape(item.paper),
            escape(item.here),
            element("div", escape(item.why), "wrap"),
        ]
        for item in items
    ]
    return table(["key", "paper", "here", "why"], rows) if rows else ""


def configuration(text: str) -> str:
    """The resolved recipe, folded."""
    if not text:
        return ""
    head = element("summary", f"The resolved recipe, {len(text.splitlines())} lines")
    return element("details", head + element("pre", escape(text)))
