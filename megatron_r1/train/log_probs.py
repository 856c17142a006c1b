"""Log-probs of samples under the current weights: a no-grad pass through Megatron's pipeline schedule.

Gives the old-policy and the reference log-probs of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.data.batching import MicroBatch, unpad
from megatron_r1.parallel.vocab import log_probs_and_entropy
from megatron_r1.parallel.world import World
from megatron_r1.train.micro_batches import own_micro_batches
from megatron_r1.train.trainer import Trainer
from megatron_r1.types import Sample


@dataclass(frozen=True, slots=True)
class _LogProbs:
    """An objective without a loss: the last stage returns log-probs [B, T]."""

    temperature: float
    vocab_size: int
    world: World
    metric_names: tuple[str, ...] = ()

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        return model(batch.tokens_BT, batch.positions_BT, None)

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> Any:
        log_probs_BT, _ = log_probs_and_entropy(
            output,
            batch.labels_BT,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            group=self.world.tensor_group,
        )
        zero = output.new_zeros(())
        return zero, zero.to(torch.int), {"log_probs": log_probs_BT}


@torch.no_grad()
def compute_log_probs(
    trainer: Trainer, samples: list[Sample], *, temperature: float, max_tokens: int, pad_id: int
) -> list[list[float]]:
    """Log-prob of every response token of every sample, under softmax(logits / temperature).

    Every rank passes the same samples and gets the same result, in their order. Collective.
    """
    world = trainer.world
    mine = own_micro_batches(samples, world, max_tokens=max_tokens, pad_id=pad_id)
    for chunk in trainer.chunks:
        chunk.eval()
    objective = _LogProbs(temperature, int(trainer.arch["vocab_size"]), world)
    outputs = trainer.run_schedule(mine, objective, forward_only=True)
    found: dict[int, list[float]] = {}
    for output, batch in zip(outputs, mine if outputs else [], strict=True):
        found.update(unpad(output["log_probs"], batch, samples))
    everywhere: dict[int, list[float]] = {}
    for part in world.all_gather_replicas(_from_last_stage(found, world)):
        everywhere.update(part)
    return [everywhere[i] for i in range(len(samples))]


def _from_last_stage(value: dict[int, list[float]], world: World) -> dict[int, list[float]]:
    if world.layout.pipeline == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=world.last_stage_rank, group=world.pipeline_group)
    return box[0]
