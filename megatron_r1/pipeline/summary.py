"""summary.json and the table at the end of a run: the first evaluation against the last."""

from __future__ import annotations

from megatron_r1.observe.progress import table
from megatron_r1.observe.rundir import RunDir, write_json


def write_summary(run: RunDir) -> None:
    """Write summary.json and print the same as a table; nothing where the run evaluated nothing."""
    states = run.read_stages()
    evals = [state for state in states if state.kind == "eval" and state.state == "done"]
    if not evals:
        return
    before, after = evals[0].result, evals[-1].result
    k = int(after["eval/k"])
    names = {"pass@1": "eval/pass_at_1", f"cons@{k}": "eval/cons_at_k", "mean_tokens": "eval/length"}
    summary: dict[str, float | int] = {}
    for name, metric in names.items():
        if len(evals) > 1:
            summary[f"{name}_before"] = round(before[metric], 4)
        summary[name] = round(after[metric], 4)
    summary["heldout_problems"] = int(after["eval/problems"])
    spans = [(state.started, state.finished) for state in states if state.started and state.finished]
    summary["seconds"] = round(sum(finished - started for started, finished in spans), 1)
    write_json(run.summary_file, summary)
    columns = ["", evals[0].name, evals[-1].name] if len(evals) > 1 else ["", evals[-1].name]
    rows = []
    for name, metric in [*names.items(), (f"pass@{k}", "eval/pass_at_k"), ("format", "eval/format")]:
        values = [before[metric], after[metric]] if len(evals) > 1 else [after[metric]]
        rows.append([name, *(f"{v:.1f}" if name == "mean_tokens" else f"{100 * v:.1f} %" for v in values)])
    table(f"{int(after['eval/problems'])} held-out problems, {k} samples each", columns, rows)
