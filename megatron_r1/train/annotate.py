"""What the loss needs of each sample besides its advantage: old and reference log-probs, experts to replay.

Runs once a rollout phase. A pass is left out where the algorithm allows it, and what it costs is a metric.
"""

from __future__ import annotations

import time

import numpy as np

from megatron_r1.config.stages import GrpoStage
from megatron_r1.model.reference import Reference
from megatron_r1.train.log_probs import compute_log_probs
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.trainer import Trainer
from megatron_r1.types import Sample


def annotate(
    samples: list[Sample],
    order: list[list[int]],
    stage: GrpoStage,
    trainer: Trainer,
    batcher: Batcher,
    reference: Reference | None,
) -> dict[str, float]:
    """Fill in the samples; returns what it cost, as metrics: seconds of the slowest rank, GiB of host memory.

    order: indices of the samples of each optimizer step. Collective.
    """
    if stage.grpo.routing_replay == "rollout":
        _mark_unknown(samples, trainer)
    began = time.monotonic()
    late = _old_policy(samples, order, stage, trainer, batcher)
    metrics = {
        "time/old_log_probs": trainer.world.largest(time.monotonic() - began),
        "policy/old_pass": late / max(1, len(samples)),
    }
    if reference is not None:
        began = time.monotonic()
        with reference.swapped_in():
            scored = compute_log_probs(trainer, samples, batcher, temperature=stage.sampling.temperature)
        for sample, found in zip(samples, scored, strict=True):
            sample.reference_log_probs = found.log_probs
        metrics["time/reference_log_probs"] = trainer.world.largest(time.monotonic() - began)
        metrics["memory/reference"] = trainer.world.largest(reference.bytes / 2**30)
    return metrics


def _old_policy(
    samples: list[Sample], order: list[list[int]], stage: GrpoStage, trainer: Trainer, batcher: Batcher
) -> int:
    """Old log-probs, and with routing_replay = "trainer" the old policy's experts; how many samples needed a pass.

    A phase's first optimizer step is on-policy: its old log-probs are those of its own training forward (the ratio
    is exactly 1), so its samples need no pass unless a later epoch meets them again. With old_policy = "rollout" the
    engine's log-probs stand for them.
    """
    grpo = stage.grpo
    replay, bypass = grpo.routing_replay, grpo.correction.old_policy == "rollout"
    late: list[Sample] = []
    if len(order) > 1 and (replay == "trainer" or not bypass):
        spared = set(order[0]) if grpo.epochs == 1 and replay != "trainer" else set()
        late = [sample for i, sample in enumerate(samples) if i not in spared]
        scored = compute_log_probs(
            trainer,
            late,
            batcher,
            temperature=stage.sampling.temperature,
            record=replay == "trainer",
            replay=replay == "rollout",
        )
        for sample, found in zip(late, scored, strict=True):
            sample.old_log_probs = found.log_probs
            if replay == "trainer":
                sample.routed_experts = found.experts
    if bypass:
        for sample in samples:
            sample.old_log_probs = sample.rollout_log_probs
    return len(late)


def _mark_unknown(samples: list[Sample], trainer: Trainer) -> None:
    """Where the engine did not say which experts it used, replay is asked for and not covered: the metric shows it."""
    for sample in samples:
        if sample.routed_experts is None:
            shape = (len(sample.token_ids), len(trainer.taps.model_layers), trainer.taps.top_k)
            sample.routed_experts = np.full(shape, -1, dtype=np.int16)
