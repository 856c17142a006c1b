"""What eval stages measured, as tables: the closing one, a row a stage, and the full one, a column a stage.

The closing table is that of the paper (arXiv 2501.12948, Table 3) turned on its side. Its rows are summary.json
(`pipeline/summary.py`), the table that a run ends with, what `megatron-r1 status RUN --table` prints, and the head of
the report.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.observe.lineage import read_config, stage_tables, weights_of_stages
from megatron_r1.observe.names import METRICS, format_value, language_of, metric_of, of_benchmark
from megatron_r1.observe.progress import duration
from megatron_r1.observe.rundir import RunDir, StageState

Row = dict[str, Any]

_ORDER = ("row", "stage", "accuracy", "cons@", "pass@", "language", "format", "mean_tokens", "", "problems", "seconds")
"""Columns of the closing table; "cons@" and "pass@" end in k, and "" stands for the further benchmarks."""


def closing_rows(run: RunDir) -> list[Row]:
    """One row for each eval stage that is done, in the order of the run; see `closing_row`.

    Raises:
        UserError: a file of the run is damaged.
    """
    _, config = read_config(run)
    tables, origins = stage_tables(config), weights_of_stages(config)
    states = run.read_stages()
    known = {state.name: state for state in states}
    rows = []
    for state in states:
        if state.kind == "eval" and state.state == "done" and by_benchmark(state.result):
            origin = origins.get(state.name) or ""
            if origin in known and known[origin].state != "done":
                continue  # it measured weights that are being made anew
            weights = origin if origin in tables else Path(origin).name
            name = tables.get(state.name, {}).get("row") or weights or state.name
            rows.append(closing_row(state, str(name), known.get(origin)))
    return rows


def closing_row(state: StageState, name: str, origin: StageState | None) -> Row:
    """What one eval stage says in the closing table; shares are 0 to 1.

    The first problem set gives accuracy, cons@k, pass@k, language (where measured), format, mean_tokens and problems;
    each further one its pass@1 in a column named after it. seconds: of the stage that made the weights, None where that
    is not known.
    """
    (_, values), *others = by_benchmark(state.result).items()
    k = f"{values.get('eval/k', 0):g}"
    shown = {
        "accuracy": "eval/pass_at_1",
        f"cons@{k}": "eval/cons_at_k",
        f"pass@{k}": "eval/pass_at_k",
        "language": "eval/language",
        "format": "eval/format",
        "mean_tokens": "eval/length",
    }
    row: Row = {"row": name, "stage": state.name}
    row |= {column: round(values[metric], 4) for column, metric in shown.items() if metric in values}
    row |= {str(name): round(found["eval/pass_at_1"], 4) for name, found in others if "eval/pass_at_1" in found}
    row["problems"] = int(values.get("eval/problems", 0))
    row["seconds"] = None
    if origin is not None and origin.started is not None and origin.finished is not None:
        row["seconds"] = round(origin.finished - origin.started, 1)
    return row


def by_benchmark(result: dict[str, Any]) -> dict[str | None, dict[str, Any]]:
    """The eval metrics of a stage's result under their plain names, for each problem set that it asked, in order.

    Example: {"eval/aime/k": 16, "eval/aime/format": 1.0} -> {"aime": {"eval/k": 16, "eval/format": 1.0}}.
    """
    found: dict[str | None, dict[str, Any]] = {}
    for name, value in result.items():
        benchmark, plain = of_benchmark(name)
        if plain.startswith("eval/") and value is not None:
            found.setdefault(benchmark, {})[plain] = value
    return found


def closing_text(rows: Sequence[Row]) -> tuple[str, list[str], list[list[str]]]:
    """(title, columns, cells) of the closing table for people; problems and samples move into the title where all rows
    agree, and the stage is left out where `row` tells the rows apart.
    """
    columns = closing_columns(rows)
    title = "held-out problems"
    samples = [column.removeprefix("cons@") for column in columns if column.startswith("cons@")]
    if len({row["problems"] for row in rows}) == len(samples) == 1:
        title = f"{rows[0]['problems']} held-out problems, {samples[0]} samples each"
        columns = [column for column in columns if column != "problems"]
    if len({row["row"] for row in rows}) == len(rows):
        columns = [column for column in columns if column != "stage"]
    heads = {"row": "", "mean_tokens": "tokens", "seconds": "time"}
    return (
        title,
        [heads.get(column, column) for column in columns],
        [[_cell(column, row.get(column)) for column in columns] for row in rows],
    )


def closing_columns(rows: Iterable[Row]) -> list[str]:
    """The columns of all rows together, in the order of `closing_row`."""

    def place(name: str) -> int:
        kind = re.sub(r"(?<=@)[0-9.]+$", "", name)
        return _ORDER.index(kind if kind in _ORDER else "")

    return sorted(dict.fromkeys(name for row in rows for name in row), key=place)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column in ("row", "stage", "problems"):
        return str(value)
    if column == "seconds":
        return duration(value)
    return f"{value:.1f}" if column == "mean_tokens" else f"{100 * value:.1f} %"


def closing_markdown(rows: Sequence[Row]) -> str:
    """The closing table as Markdown, to be pasted into a README: the title heads the first column."""
    title, columns, cells = closing_text(rows)
    head, *body = [[cell.replace("|", "\\|") for cell in line] for line in ([title, *columns[1:]], *cells)]
    lines = [f"| {' | '.join(line)} |" for line in (head, *body)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


@dataclass(kw_only=True, slots=True)
class EvaluationTable:
    """What the eval stages measured, as text."""

    columns: list[str]
    rows: list[list[str]]


def evaluation_table(states: Sequence[StageState]) -> EvaluationTable | None:
    """A column for each eval stage that has a result and a row for each metric; None without any."""
    done = [state for state in states if by_benchmark(state.result)]
    if not done:
        return None
    rows: list[list[str]] = []
    for name in _evaluation_metrics(done):
        values = [state.result.get(name) for state in done]
        k = next((k for state in done if (k := samples_of(name, state.result)) is not None), None)
        unit = metric_of(name)
        assert unit is not None, name
        label = evaluation_label(name, k)
        rows.append([label, *("-" if v is None else format_value(float(v), unit.unit) for v in values)])
    return EvaluationTable(columns=["", *(state.name for state in done)], rows=rows)


def _evaluation_metrics(states: Sequence[StageState]) -> list[str]:
    # a problem set after the other, each in the order of METRICS, each language after the mean over all
    order = list(METRICS)
    written = list(dict.fromkeys(n for s in states for n, value in s.result.items() if value is not None))
    sets = list(dict.fromkeys(of_benchmark(name)[0] for name in written))

    def place(name: str) -> tuple[int, int, str]:
        benchmark, plain = of_benchmark(name)
        whole = plain if language_of(plain) is None else plain.rpartition("/")[0]
        return sets.index(benchmark), order.index(whole), plain

    return sorted((n for n in written if n.startswith("eval/") and metric_of(n) is not None), key=place)


def samples_of(name: str, result: dict[str, Any]) -> float | None:
    """k of the problem set that a metric of an eval stage belongs to."""
    benchmark, _ = of_benchmark(name)
    return result.get("eval/k" if benchmark is None else f"eval/{benchmark}/k")


def evaluation_label(name: str, k: float | None) -> str:
    """What people call an eval metric: ("eval/cons_at_k", 16) -> "cons@16", ("eval/pass_at_1", 16)
    -> "pass@1", ("eval/language/zh", 16) -> "language zh", ("eval/aime/pass_at_1", 16) -> "aime pass@1".
    """
    if not name.startswith("eval/"):
        return name
    benchmark, plain = of_benchmark(name)
    what = plain.removeprefix("eval/")
    shown = "k" if k is None else f"{k:g}"
    named = {"pass_at_1": "pass@1", "cons_at_k": f"cons@{shown}", "pass_at_k": f"pass@{shown}"}
    label = named.get(what, "samples a problem" if what == "k" else re.sub("[_/]", " ", what))
    return label if benchmark is None else f"{benchmark} {label}"
