"""Which metrics the report draws in which chart; `observe/sections.py` puts the charts on the
page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron_r1.observe.axes import Point
from megatron_r1.observe.charts import Series, line_chart, svg_file
from megatron_r1.observe.collect import Curve, StageView
from megatron_r1.observe.names import METRICS, Unit, language_of, name_of


class Panel(NamedTuple):
    """One chart of a stage, drawn when it has written any of `metrics`; they share one unit."""

    title: str
    metrics: dict[str, str]  # metric name -> label in the legend
    smoothed: bool = True


PANELS: tuple[Panel, ...] = (
    Panel(
        "Accuracy and format",
        {
            "reward/accuracy": "accuracy",
            "reward/format": "format",
            "reward/majority": "majority vote",
        },
    ),
    Panel("Words of the thought in its language", {"reward/language": "all prompts"}),
    Panel("Mean value of reward models", {"reward/model": "all"}),
    Panel("Reward-hacking watch", {"reward/hacking_watch": "1: values rise, accuracy falls"}, smoothed=False),
    Panel("Mean reward", {"reward/mean": "mean reward"}),
    Panel(
        "Response length",
        {
            "rollout/length": "all",
            "rollout/length_correct": "correct",
            "rollout/length_wrong": "not correct",
        },
    ),
    Panel("KL to the reference", {"policy/kl": "KL"}),
    Panel("KL to the teacher", {"distill/reverse_kl": "k1", "distill/reverse_kl_k3": "k3"}),
    Panel("Entropy", {"policy/entropy": "entropy"}),
    Panel("Language-model loss", {"loss/lm": "next token"}),
    Panel("Tokens that are learned", {"train/learned_share": "of the global batch"}),
    Panel("Multi-token-prediction loss", {"loss/mtp": "tokens after the next"}),
    Panel("Policy loss", {"loss/total": "KL term included"}),
    Panel("Pairwise loss", {"loss/pairwise": "training pairs"}),
    Panel("Pairs in the right order", {"reward_model/accuracy": "training pairs"}),
    Panel("Mean value", {"reward_model/chosen": "chosen", "reward_model/rejected": "rejected"}),
    Panel("Gradient norm", {"optim/grad_norm": "gradient norm"}),
    Panel("Throughput", {"rollout/tokens_per_second": "sampled", "train/tokens_per_second": "trained"}),
    Panel(
        "Groups without signal",
        {
            "groups/no_signal": "no signal",
            "groups/all_correct": "all correct",
            "groups/all_wrong": "all wrong",
        },
    ),
    Panel(
        "Verdict unknown, completions cut",
        {"verdict/unknown": "verdict unknown", "rollout/truncated": "cut at the limit"},
    ),
    Panel("Clipped tokens", {"policy/clip_low": "from below", "policy/clip_high": "from above"}),
    Panel("Probability ratio", {"policy/ratio": "mean ratio"}),
    Panel(
        "Trainer against sampler",
        {"policy/engine_gap": "mean |difference in log-prob|", "policy/engine_k3": "KL(sampler || trainer)"},
    ),
    Panel("Trainer against sampler: effective sample size", {"policy/engine_ess": "of the tokens"}),
    Panel(
        "Trainer against sampler: tokens apart or left out",
        {
            "policy/engine_outliers": "ratio above 2 or below 1/2",
            "policy/correction_masked": "tokens left out",
            "policy/correction_vetoed": "responses left out whole",
        },
    ),
    Panel(
        "Expert load above the mean", {"moe/max_violation": "worst layer", "moe/max_violation_mean": "mean of layers"}
    ),
    Panel("Least used expert", {"moe/load_min": "load / mean load, worst layer"}),
    Panel("Entropy of routing", {"moe/entropy": "mean of layers"}),
    Panel(
        "Expert assignments",
        {
            "moe/dropped": "dropped",
            "moe/replay_coverage": "replayed, of those asked for",
            "moe/replay_agreement": "replayed and the router's own",
        },
    ),
    Panel("Learning rate", {"optim/lr": "learning rate"}, smoothed=False),
    Panel(
        "Time a step",
        {
            "time/step": "whole step",
            "time/rollout": "rollout",
            "time/old_log_probs": "old log-probs",
            "time/reference_log_probs": "reference log-probs",
            "time/train": "train",
        },
    ),
)

CURVE_SIZE = (560, 320)
"""Width and height in pixels of each half of the learning curve."""


def stage_charts(stage: StageView) -> list[str]:
    """One <svg> for each panel of which the stage has written something."""
    charts = []
    for panel in PANELS:
        series = [
            Series(name=label, points=points, smoothed=panel.smoothed)
            for name, label in (panel.metrics | _parts(panel, stage)).items()
            if (points := stage.series(name))
        ]
        if series:
            charts.append(line_chart(panel.title, series, METRICS[next(iter(panel.metrics))].unit))
    return charts


def _parts(panel: Panel, stage: StageView) -> dict[str, str]:
    """Metric name -> label of the languages, reward models and domains that a panel's metrics are written for."""
    found = sorted({name for row in stage.rows for name in row if language_of(name) or name_of(name)})
    return {name: name.rpartition("/")[2] for name in found if name.rpartition("/")[0] in panel.metrics}


def watch_charts(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
    """The reward-hacking watch as one SVG file: mean value of each reward model, and accuracy, over the same steps.

    rows: metrics of the phases with reward models, and their "step"; phases with an alarm are marked by red ticks.
    """

    def points(key: str) -> list[Point]:
        return [(row["step"], row[key]) for row in rows if key in row]

    values = [Series(name=name, points=points(f"reward/model/{name}")) for name in names]
    alarms = [(row["step"], math.nan) for row in rows if row.get("reward/hacking_watch")]
    ticks = [Series(name="red ticks: values rise, accuracy falls", points=alarms)] if alarms else []
    accuracy = [Series(name="rule-judged prompts", points=points("reward/accuracy")), *ticks]
    title = f"Mean value of reward model {', '.join(names)}"
    (width, height), hover = CURVE_SIZE, False
    charts = [
        line_chart(title, values, "1", width=width, height=height, hover=hover),
        line_chart("Accuracy", accuracy, "share", width=width, height=height, hover=hover),
    ]
    return svg_file(charts, width, height)


def curve_charts(curve: Curve, hover: bool) -> list[str]:
    """The paper's figure: accuracy, then response length, over RL steps; those with data."""
    halves: list[tuple[str, list[Series], Unit]] = [
        ("Accuracy", curve.accuracy, "share"),
        ("Average response length", curve.length, "tokens"),
    ]
    label, (width, height) = "RL optimizer step", CURVE_SIZE
    return [
        line_chart(title, series, unit, x_label=label, width=width, height=height, hover=hover)
        for title, series, unit in halves
        if series
    ]
