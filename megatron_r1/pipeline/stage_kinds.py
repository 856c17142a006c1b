"""Kind of stage -> the function that runs it on every rank, imported when such a stage runs: they load torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_r1.train.context import RunContext

Runner = Callable[[Any, RunContext, Path | None], dict[str, Any]]
"""(stage, its context, the checkpoint it begins with) -> its result, as JSON."""

RUNNERS = {
    "pretrain": "megatron_r1.train.pretrain:pretrain",
    "sft": "megatron_r1.train.sft:sft",
    "grpo": "megatron_r1.train.grpo:grpo",
    "reward_model": "megatron_r1.train.reward_model:reward_model",
    "distill": "megatron_r1.train.distill:distill",
    "sample": "megatron_r1.pipeline.making.sample:run_sample",
    "preferences": "megatron_r1.pipeline.making.preferences:run_preferences",
    "mix": "megatron_r1.pipeline.making.mix:run_mix",
    "eval": "megatron_r1.pipeline.outputs.evaluation:run_evaluation",
    "export": "megatron_r1.pipeline.outputs.export:run_export",
}


def runner(kind: str) -> Runner:
    """What runs a stage of this kind."""
    module, _, name = RUNNERS[kind].partition(":")
    found: Runner = getattr(importlib.import_module(module), name)
    return found
