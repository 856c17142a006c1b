"""A reward model from preference pairs: the trunk of the policy learns, with a scalar head, which answer is preferred.

The loop: pairs -> optimizer step -> metrics -> checkpoint. DeepSeek-R1's helpful reward model (arXiv 2501.12948, v2
appendix B.2) is R1 itself with such a head: batch 256, learning rate 6e-6, one epoch, at most 8,192 tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_r1.config.run import RewardModelStage
from megatron_r1.data.heldout import heldout_ids
from megatron_r1.data.preference_pairs import PairBatches, PreferencePairs, sequences
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.train.context import RunContext
from megatron_r1.train.loop import StageLoop
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.reward_objective import RewardObjective
from megatron_r1.train.trainer import Trainer
from megatron_r1.types import PreferencePair, Sample

logger = logging.getLogger(__name__)

HELDOUT = ("reward_model/heldout_accuracy", "reward_model/heldout_loss")


def reward_model(stage: RewardModelStage, context: RunContext, start: Path | None) -> dict[str, float]:
    """Run or resume the stage; returns loss, accuracy and margin of its last step. Collective.

    start: checkpoint whose weights it begins with, of a language model (the head is then new) or a reward model; None:
    fresh weights.
    """
    world, tokenizer = context.world, context.tokenizer
    trainer = Trainer(
        context.arch,
        context.config.model,
        world,
        stage.optimizer,
        stage.steps,
        train_mtp=False,
        expert_bias_frozen=True,  # the experts stay where the language model left them
        scalar_head=True,
    )
    batcher = Batcher.of(stage, context, together=2)
    longest = stage.longest(context.arch["max_position_embeddings"])
    heldout = _heldout_pairs(stage, tokenizer, longest)
    source = PreferencePairs(stage.pairs, tokenizer)
    pairs = PairBatches(
        source,
        shuffle=stage.pairs.shuffle,
        seed=context.config.seed,
        exclude=context.heldout | heldout_ids(pair.question for pair in heldout),
        max_tokens=longest,
    )
    logger.info("%d pairs: %.2f epochs in %d steps", len(source), stage.steps * stage.batch / len(source), stage.steps)
    with StageLoop(stage, context, trainer) as loop:
        state = loop.resume(start)
        if state is not None:
            pairs.restore(state["pairs"])
        while trainer.step < stage.steps:
            began = time.monotonic()
            samples = sequences(pairs.take(stage.batch))
            objective = RewardObjective(pairs=stage.batch, tokens=_tokens(samples), world=world)
            result = trainer.train_step(batcher(samples), objective)
            loop.check_finite(result, samples)
            seconds = time.monotonic() - began
            means = {name: value / stage.batch for name, value in result.sums.items()}
            measured = _measure(heldout, trainer, batcher) if heldout and trainer.step == stage.steps else {}
            loop.log(
                {
                    **measured,
                    "loss/pairwise": means["loss"],
                    "reward_model/accuracy": means["correct"],
                    "reward_model/margin": means["chosen"] - means["rejected"],
                    "reward_model/chosen": means["chosen"],
                    "reward_model/rejected": means["rejected"],
                    **result.routing,
                    "optim/grad_norm": result.grad_norm,
                    "optim/lr": result.lr,
                    "train/tokens": float(objective.tokens),
                    "train/tokens_per_second": objective.tokens / seconds,
                    "data/held_out_skips": float(pairs.excluded),
                    "data/too_long": float(pairs.too_long),
                    "time/step": seconds,
                }
            )
            loop.end_of_step(lambda: {"pairs": pairs.state()})
        return loop.closing("loss/pairwise", "reward_model/accuracy", "reward_model/margin", *HELDOUT)


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.token_ids) for sample in samples)


def _heldout_pairs(stage: RewardModelStage, tokenizer: Tokenizer, longest: int) -> list[PreferencePair]:
    """The held-out pairs that are short enough to be scored as training scores."""
    if stage.heldout is None:
        return []
    source = PreferencePairs(stage.heldout, tokenizer)
    found = [source[i] for i in range(len(source))]
    kept = [pair for pair in found if max(map(len, (pair.chosen.token_ids, pair.rejected.token_ids))) <= longest]
    if len(kept) < len(found):
        logger.info("%d of %d held-out pairs are longer than %d tokens", len(found) - len(kept), len(found), longest)
    return kept


def _measure(pairs: list[PreferencePair], trainer: Trainer, batcher: Batcher) -> dict[str, float]:
    samples = sequences(pairs)
    objective = RewardObjective(pairs=len(pairs), tokens=_tokens(samples), world=trainer.world)
    sums = trainer.measure(batcher(samples), objective)
    return dict(zip(HELDOUT, (sums["correct"] / len(pairs), sums["loss"] / len(pairs)), strict=True))
