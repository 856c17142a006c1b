"""Pre-training on generated documents: makes the base model that reinforcement learning starts from."""

from __future__ import annotations

from pathlib import Path

from megatron_r1.config.stages import PretrainStage
from megatron_r1.data.text_batches import TextBatches
from megatron_r1.train.context import RunContext
from megatron_r1.train.language_model import train_language_model
from megatron_r1.train.trainer import Trainer


def pretrain(stage: PretrainStage, context: RunContext, start: Path | None) -> dict[str, float]:
    """Run or resume the stage; returns the loss of its last step. Collective.

    start: checkpoint whose weights it begins with; None: fresh ones.
    """
    trainer = Trainer(
        context.arch, context.model, context.world, stage.optimizer, stage.steps, train_mtp=stage.mtp_loss > 0
    )
    batches = TextBatches(
        stage.corpus,
        context.tokenizer,
        batch_tokens=stage.batch_tokens,
        steps=stage.steps,
        seed=context.config.seed,
        exclude=context.heldout,
        interleave=stage.interleave,
    )
    return train_language_model(stage, context, start, trainer, batches, batches.take)
