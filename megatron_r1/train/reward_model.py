"""A reward model: the trunk of the policy learns, with a scalar head, which answer is preferred (from preference pairs)
or which one is good (from labelled answers).

The loop: pairs or labels -> optimizer step -> metrics -> checkpoint. DeepSeek-R1's helpful and safety reward models
(arXiv 2501.12948, v2 appendix B.2) are R1 itself with such a head: batch 256, learning rate 6e-6, one epoch, at most
8,192 tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_r1.config.stages import RewardModelStage
from megatron_r1.data.heldout import heldout_ids
from megatron_r1.data.labelled_answers import LabelledAnswers
from megatron_r1.data.preference_pairs import PreferencePairs
from megatron_r1.data.reward_rows import RewardBatches, RewardRows, fits, sequences
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.parallel.world import World
from megatron_r1.train.context import RunContext
from megatron_r1.train.loop import StageLoop
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.reward_objective import PointwiseObjective, RewardObjective
from megatron_r1.train.trainer import Trainer
from megatron_r1.types import LabelledAnswer, PreferencePair

logger = logging.getLogger(__name__)

HELDOUT = ("reward_model/heldout_accuracy", "reward_model/heldout_loss")
CLOSING = (
    "loss/pairwise",
    "loss/pointwise",
    *(f"reward_model/{name}" for name in ("accuracy", "margin", "good", "bad")),
)

Items = Sequence[PreferencePair] | Sequence[LabelledAnswer]


def reward_model(stage: RewardModelStage, context: RunContext, start: Path | None) -> dict[str, float]:
    """Run or resume the stage; returns loss, accuracy and mean values of its last step. Collective.

    start: checkpoint whose weights it begins with, of a language model (the head is then new) or a reward model; None:
    fresh weights.
    """
    world, tokenizer = context.world, context.tokenizer
    trainer = Trainer(
        context.arch,
        context.model,
        world,
        stage.optimizer,
        stage.steps,
        train_mtp=False,
        expert_bias_frozen=True,  # the experts stay where the language model left them
        scalar_head=True,
    )
    batcher = Batcher.of(stage, context, together=2 if stage.loss == "pairwise" else 1)
    longest = stage.longest(context.arch["max_position_embeddings"])
    source, measured_on = open_sources(stage, tokenizer)
    heldout = _short_enough(measured_on, longest)
    rows: RewardBatches[Any] = RewardBatches(
        source,
        shuffle=source.config.shuffle,
        seed=context.config.seed,
        exclude=context.heldout | heldout_ids(item.question for item in heldout),
        max_tokens=longest,
    )
    epochs = stage.steps * stage.batch / len(source)
    logger.info("%d %ss: %.2f epochs in %d steps", len(source), source.thing, epochs, stage.steps)
    with StageLoop(stage, context, trainer) as loop:
        state = loop.resume(start)
        if state is not None:
            rows.restore(state[source.config.table])
        while trainer.step < stage.steps:
            began = time.monotonic()
            items = rows.take(stage.batch)
            samples, objective = sequences(items), _objective(items, world)
            result = trainer.train_step(batcher(samples), objective)
            loop.check_finite(result, samples)
            seconds = time.monotonic() - began
            measured = _measure(heldout, trainer, batcher) if heldout and trainer.step == stage.steps else {}
            loop.log(
                {
                    **measured,
                    **objective.metrics(result.sums),
                    **result.routing,
                    "optim/grad_norm": result.grad_norm,
                    "optim/lr": result.lr,
                    "train/tokens": float(objective.tokens),
                    "train/tokens_per_second": objective.tokens / seconds,
                    "data/held_out_skips": float(rows.excluded),
                    "data/too_long": float(rows.too_long),
                    "data/bad_rows": float(rows.bad),
                    "time/step": seconds,
                }
            )
            loop.end_of_step(lambda: {source.config.table: rows.state()})
        return loop.closing(*CLOSING, *HELDOUT)


def open_sources(
    stage: RewardModelStage, tokenizer: Tokenizer
) -> tuple[RewardRows[Any, Any], RewardRows[Any, Any] | None]:
    """What the stage trains on, and what it is measured on at its end.

    Raises:
        UserError: as `RewardRows`.
    """
    if stage.loss == "pairwise" and stage.pairs is not None:
        return (
            PreferencePairs(stage.pairs, tokenizer),
            None if stage.heldout is None else PreferencePairs(stage.heldout, tokenizer),
        )
    if stage.labels is None:
        raise ValueError(f"stage {stage.name} has no data; its table is checked when it is loaded")
    return (
        LabelledAnswers(stage.labels, tokenizer),
        None if stage.heldout_labels is None else LabelledAnswers(stage.heldout_labels, tokenizer),
    )


def _objective(items: Items, world: World) -> RewardObjective | PointwiseObjective:
    """Of one global batch."""
    tokens = sum(len(sample.token_ids) for sample in sequences(items))
    labels = [item.good for item in items if isinstance(item, LabelledAnswer)]
    if labels:
        return PointwiseObjective(good=labels, tokens=tokens)
    return RewardObjective(pairs=len(items), tokens=tokens, world=world)


def _short_enough(source: RewardRows[Any, Any] | None, longest: int) -> list[Any]:
    """The held-out items that are short enough to be scored as training scores."""
    if source is None:
        return []
    kept = [item for index in range(len(source)) if fits(item := source[index], longest)]
    if left_out := len(source) - len(kept):
        logger.info("%d of %d held-out %ss are longer than %d tokens", left_out, len(source), source.thing, longest)
    return kept


def _measure(items: Items, trainer: Trainer, batcher: Batcher) -> dict[str, float]:
    sums = trainer.measure(batcher(sequences(items)), _objective(items, trainer.world))
    return dict(zip(HELDOUT, (sums["correct"] / len(items), sums["loss"] / len(items)), strict=True))
