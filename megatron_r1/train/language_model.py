"""The loop of the stages that learn to continue text: `pretrain` on documents, `sft` on conversations.

batch -> optimizer step -> metrics -> checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_r1.config.stages import PretrainStage, SftStage
from megatron_r1.train.context import RunContext
from megatron_r1.train.loop import StageLoop
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.objectives import LanguageModelObjective
from megatron_r1.train.trainer import Trainer
from megatron_r1.types import Sample

Measure = Callable[[Trainer, Batcher], dict[str, float]]


class SampleSource(Protocol):
    """Endless batches that can be resumed."""

    def metrics(self) -> dict[str, float]:
        """What was passed and left out so far."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the next batch comes from, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        ...


def train_language_model(
    stage: PretrainStage | SftStage,
    context: RunContext,
    start: Path | None,
    trainer: Trainer,
    source: SampleSource,
    take: Callable[[int], list[Sample]],
    measure: Measure | None = None,
) -> dict[str, float]:
    """Run or resume the stage; returns the losses of its last step. Collective.

    The loss is the mean over the learned tokens of the global batch, all micro-batches and replicas.

    start: checkpoint whose weights it begins with; None: fresh ones. take: optimizer step, counted from 0 -> its global
    batch, drawn from `source`. measure: further metrics of the last step.
    """
    batcher = Batcher.of(stage, context)
    with StageLoop(stage, context, trainer) as loop:
        state = loop.resume(start)
        if state is not None:
            source.restore(state["batches"])
        while trainer.step < stage.steps:
            began = time.monotonic()
            samples = take(trainer.step)
            result = trainer.train_step(batcher(samples, trainer.mtp_depths), LanguageModelObjective(stage.mtp_loss))
            loop.check_finite(result, samples)
            seconds = time.monotonic() - began
            tokens = count_tokens(samples)
            mtp = {"loss/mtp": result.sums["mtp_nll"] / n} if (n := result.sums["mtp_tokens"]) else {}
            measured = measure(trainer, batcher) if measure is not None and trainer.step == stage.steps else {}
            loop.log(
                {
                    "loss/lm": result.sums["nll"] / max(1.0, result.sums["tokens"]),
                    **mtp,
                    **measured,
                    **result.routing,
                    "optim/grad_norm": result.grad_norm,
                    "optim/lr": result.lr,
                    "train/tokens": float(tokens),
                    "train/learned_share": result.sums["tokens"] / tokens,
                    **source.metrics(),
                    "train/tokens_per_second": tokens / seconds,
                    "time/step": seconds,
                }
            )
            loop.end_of_step(lambda: {"batches": source.state()})
        return loop.closing("loss/lm", "loss/heldout")


def heldout_loss(samples: Sequence[Sample], trainer: Trainer, batcher: Batcher) -> float:
    """Mean cross-entropy of the learned tokens of `samples`, without a step. Collective."""
    sums = trainer.measure(batcher(samples), LanguageModelObjective())
    return sums["nll"] / sums["tokens"]


def count_tokens(samples: Sequence[Sample]) -> int:
    """Tokens of all sequences, learned or not."""
    return sum(len(sample.token_ids) for sample in samples)
