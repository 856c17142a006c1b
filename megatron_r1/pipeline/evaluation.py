"""The `eval` stage: a checkpoint judged on held-out problems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.config.run import EvalStage
from megatron_r1.observe.metrics import MetricsWriter
from megatron_r1.observe.progress import Progress
from megatron_r1.observe.rollouts import RolloutWriter
from megatron_r1.rollout.megatron import MegatronEngine
from megatron_r1.train.context import RunContext
from megatron_r1.train.evaluate import evaluate, heldout_prompts
from megatron_r1.train.exclusions import check_never_trained_on
from megatron_r1.train.start import load_start
from megatron_r1.train.trainer import Trainer


def run_evaluation(stage: EvalStage, context: RunContext, start: Path | None) -> dict[str, Any]:
    """Load the checkpoint, sample, judge, write metrics and completions; returns the metrics and style counts."""
    prompts = heldout_prompts(stage, context.tokenizer)
    check_never_trained_on(prompts, start)
    # The optimizer is never stepped; building it keeps one way of loading weights.
    trainer = Trainer(context.arch, context.config.model, context.world, OptimizerConfig(lr=1e-6), 1, train_mtp=False)
    if start is not None:
        load_start(start, trainer)
    engine = MegatronEngine(
        trainer.chunks,
        context.world,
        context.tokenizer,
        context.arch["vocab_size"],
        context.arch["max_position_embeddings"],
    )
    share = -(-stage.problems // context.world.replicas) * stage.k
    with Progress(stage.name, share, enabled=context.world.rank == 0) as progress:
        metrics, styles, groups = evaluate(
            stage,
            prompts,
            engine,
            context.world,
            context.config.seed,
            lambda done, total: progress.update(share * done // total, {}),
        )
    if context.world.rank == 0:
        folder = context.run.stage(stage.name).path
        with MetricsWriter(folder, context.attempt) as writer:
            writer.truncate_after(-1)  # an attempt that was killed here may have written already
            writer.write(0, metrics)
        RolloutWriter(folder).write(0, groups)
    return {**metrics, "styles": styles}
