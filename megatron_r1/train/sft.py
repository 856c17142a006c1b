"""Supervised fine-tuning on conversations: cold start, the 800K mix, distillation. Only answers are learned.

DeepSeek-R1 (arXiv 2501.12948, v2 appendix B.4.2 and B.4.3): 2-3 epochs, cosine from 5e-5 to a tenth, at most 32,768
tokens, batch 128; distillation the same with batch 64 and a learning rate for each student. Packing, masking and how
the loss is averaged are not stated: here rows are packed, and the mean is over all learned tokens of the global batch.
"""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_r1.config.stages import SftStage
from megatron_r1.data.conversations import ConversationBatches, open_batches, open_heldout, questions_of
from megatron_r1.train.context import RunContext
from megatron_r1.train.language_model import Measure, heldout_loss, train_language_model
from megatron_r1.train.trainer import Trainer

logger = logging.getLogger(__name__)


def sft(stage: SftStage, context: RunContext, start: Path | None) -> dict[str, float]:
    """Run or resume the stage, whose `steps` are known; returns its last loss, and the held-out one. Collective.

    start: checkpoint whose weights it begins with; None: fresh ones.
    """
    trainer = Trainer(
        context.arch,
        context.model,
        context.world,
        stage.optimizer,
        stage.steps,
        train_mtp=stage.mtp_loss > 0,
        expert_bias_frozen=stage.expert_bias == "frozen",
    )
    positions = context.arch["max_position_embeddings"]
    heldout = open_heldout(stage, context.tokenizer, positions)
    exclude = context.heldout | questions_of(heldout)
    batches = open_batches(stage, context.tokenizer, positions, seed=context.config.seed, exclude=exclude)
    rows = len(batches.source)
    logger.info("%d conversations: %.2f epochs in %d steps", rows, stage.steps * stage.batch / rows, stage.steps)
    measure = None if heldout is None else _measure_of(heldout)
    return train_language_model(
        stage, context, start, trainer, batches, lambda step: batches.take(stage.batch), measure
    )


def _measure_of(heldout: ConversationBatches) -> Measure:
    """The held-out loss after the last step, on those that are short enough to be trained on."""
    samples = heldout.all()
    if heldout.too_long:
        logger.info("%d of %d held-out conversations are too long", heldout.too_long, len(heldout.source))
    return lambda trainer, batcher: {"loss/heldout": heldout_loss(samples, trainer, batcher)}
