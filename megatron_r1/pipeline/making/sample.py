"""The `sample` stage: prompts are sampled, correct and readable answers become conversations to fine-tune on.

Rejection sampling and cold-start data of DeepSeek-R1 (arXiv 2501.12948 v2, appendices B.3.2 and B.3.3). Between a stage
that trains by reinforcement and one that fine-tunes: `chunks.py` of this room samples, `sample_selection.py` judges and
selects, `sample_card.py` says what came of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.config.stages import SampleStage
from megatron_r1.observe.rundir import write_text
from megatron_r1.pipeline.making.card_parts import kept_none, name_of_weights, totals
from megatron_r1.pipeline.making.chunks import run_chunks
from megatron_r1.pipeline.making.sample_card import REASONS, sample_card, shares
from megatron_r1.pipeline.making.sample_selection import Selection, measured
from megatron_r1.train.context import RunContext


def run_sample(stage: SampleStage, context: RunContext, start: Path | None) -> dict[str, Any]:
    """Write data.jsonl and its card from the weights `start`; returns the counts. Collective.

    Raises UserError when nothing was kept, JudgeDown (see `judges/endpoint.py`), Stopped.
    """
    if start is None:
        raise UserError(f"stage {stage.name!r} has no weights to sample from: set `from` to a stage or a folder")
    work = Selection(stage, context.tokenizer, context.config.seed)
    summaries = run_chunks(stage, context, start, measured(stage), work, lambda done: shares(done[-1:]))
    folder = context.run.stage(stage.name).path
    if context.world.rank == 0:
        weights = name_of_weights(start, context.run.path)
        for name, text in sample_card(stage, context.config.name, weights, summaries).items():
            write_text(folder / name, text)
    total = totals(summaries, REASONS)
    if not total.rows:
        cure = "Start from weights that answer better, raise `n`, or loosen [stage.filter]"
        raise kept_none(stage.name, "samples", total, folder, cure)
    return {**shares(summaries), "dropped": total.dropped}
