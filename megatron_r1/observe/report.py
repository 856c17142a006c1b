"""`megatron-r1 report RUN`: one HTML page about a run that needs neither a network nor a library.

Reads through `observe/collect.py`, draws with `observe/charts.py`, fills `templates/report.html`.
All text of the run is escaped, and a content-security policy allows only the page's own script, so
a completion that contains markup is shown and never run.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import time
from pathlib import Path
from string import Template

from megatron_r1.config.errors import UserError
from megatron_r1.observe import sections
from megatron_r1.observe.charts import CHART_CSS, COLOUR_CSS, svg_file
from megatron_r1.observe.collect import RunView, collect
from megatron_r1.observe.markup import badge, escape
from megatron_r1.observe.panels import CURVE_SIZE, curve_charts
from megatron_r1.observe.rundir import RunDir, write_text


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html and return it; works at any moment of a run.

    Raises UserError when `run_dir` is no run directory or one of its files is damaged.
    """
    view = collect(Path(run_dir))
    path = RunDir(Path(run_dir)).report
    write_text(path, render(view, now=time.time()))
    return path


def write_learning_curve(run_dir: Path, path: Path) -> Path:
    """Write the figure "accuracy and response length over RL steps" as one SVG file; returns
    `path`.

    Raises UserError when `run_dir` is no run directory, or has neither RL metrics nor evaluations.
    """
    charts = curve_charts(collect(Path(run_dir)).curve, hover=False)
    if not charts:
        raise UserError(
            f"{run_dir}: no learning curve yet, no stage has written reward/accuracy and no "
            "evaluation is done; wait for the first RL step"
        )
    write_text(Path(path), svg_file(charts, *CURVE_SIZE))
    return Path(path)


def render(view: RunView, now: float) -> str:
    """The page as text. now: seconds since 1970, shown as the time of writing."""
    templates = importlib.resources.files("megatron_r1.observe") / "templates"
    page, style, script = ((templates / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    plots = [
        (f"stage-{i}", f"Stage {stage.state.name}", sections.stage_plots(stage)) for i, stage in enumerate(view.stages)
    ]
    blocks = [
        ("summary", "Summary", sections.summary(view)),
        ("curve", "Learning curve", sections.learning_curve(view)),
        ("stages", "Stages", sections.stage_table(view)),
        *plots,
        ("completions", "Sampled completions", sections.completions(view)),
        ("departures", "What departs from the paper", sections.departures(view.departures)),
        ("configuration", "Configuration", sections.configuration(view.config_text)),
    ]
    shown = [(key, escape(title), body) for key, title, body in blocks if body]
    return Template(page).substitute(
        title=escape(view.name),
        state=badge(sections.run_state(view)),
        written=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)),
        unfinished=sections.unfinished_note(view),
        links="".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown),
        sections="\n".join(f'<section id="{key}"><h2>{title}</h2>{body}</section>' for key, title, body in shown),
        style=COLOUR_CSS + style + CHART_CSS,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
