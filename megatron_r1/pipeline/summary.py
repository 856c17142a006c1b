"""summary.json and the table at the end of a run: one row for each evaluation."""

from __future__ import annotations

from megatron_r1.observe.evaluations import closing_rows, closing_text
from megatron_r1.observe.progress import table
from megatron_r1.observe.rundir import RunDir, write_json


def write_summary(run: RunDir) -> None:
    """Write summary.json, a list of rows, and print the same as a table; nothing where the run evaluated nothing."""
    rows = closing_rows(run)
    if rows:
        write_json(run.summary_file, rows)
        table(*closing_text(rows))
