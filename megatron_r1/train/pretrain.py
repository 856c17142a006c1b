"""Pre-training on generated documents: makes the base model that reinforcement learning starts from.

The loop: batch -> optimizer step -> metrics -> checkpoint.
"""

from __future__ import annotations

import time
from pathlib import Path

from megatron_r1.config.run import PretrainStage
from megatron_r1.data.text_batches import TextBatches
from megatron_r1.train.context import RunContext
from megatron_r1.train.loop import StageLoop
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.objectives import LanguageModelObjective
from megatron_r1.train.trainer import Trainer


def pretrain(stage: PretrainStage, context: RunContext, start: Path | None) -> dict[str, float]:
    """Run or resume the stage; returns the loss of its last step. Collective.

    start: checkpoint whose weights it begins with; None: fresh ones.
    """
    world, tokenizer = context.world, context.tokenizer
    trainer = Trainer(
        context.arch, context.config.model, world, stage.optimizer, stage.steps, train_mtp=stage.mtp_loss > 0
    )
    batcher = Batcher.of(stage, context)
    batches = TextBatches(
        stage.corpus,
        tokenizer,
        batch_tokens=stage.batch_tokens,
        steps=stage.steps,
        seed=context.config.seed,
        exclude=context.heldout,
    )
    with StageLoop(stage, context, trainer) as loop:
        state = loop.resume(start)
        if state is not None:
            batches.restore(state["batches"])
        while trainer.step < stage.steps:
            began = time.monotonic()
            samples = batches.take(trainer.step)
            result = trainer.train_step(batcher(samples, trainer.mtp_depths), LanguageModelObjective(stage.mtp_loss))
            loop.check_finite(result, samples)
            seconds = time.monotonic() - began
            tokens = sum(len(sample.token_ids) for sample in samples)
            mtp = {"loss/mtp": result.sums["mtp_nll"] / n} if (n := result.sums["mtp_tokens"]) else {}
            loop.log(
                {
                    "loss/lm": result.sums["nll"] / max(1.0, result.sums["tokens"]),
                    **mtp,
                    **result.routing,
                    "optim/grad_norm": result.grad_norm,
                    "optim/lr": result.lr,
                    "train/tokens": float(tokens),
                    "data/held_out_skips": float(batches.excluded),
                    "train/tokens_per_second": tokens / seconds,
                    "time/step": seconds,
                }
            )
            loop.end_of_step(lambda: {"batches": batches.state()})
        return loop.closing("loss/lm")
