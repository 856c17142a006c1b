"""Log-probs of samples under the current weights: a no-grad pass through Megatron's pipeline schedule.

Gives the old-policy and the reference log-probs of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_r1.data.batching import MicroBatch, unpad
from megatron_r1.model.routing import whole_rows
from megatron_r1.parallel.context import zigzag
from megatron_r1.parallel.world import World
from megatron_r1.train.frozen import FrozenModel
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.scoring import by_sequence, score_tokens
from megatron_r1.types import Sample

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _LogProbs:
    """An objective without a loss: the last stage returns log-probs [N, L]."""

    temperature: float
    metric_names: tuple[str, ...] = ()
    maximum_names: tuple[str, ...] = ()

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        return score_tokens(model, batch, temperature=self.temperature)

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> Any:
        zero = output.new_zeros(())
        return zero, zero.to(torch.int), {"log_probs": by_sequence(output, batch).log_probs_NL}


@dataclass(frozen=True, slots=True)
class Scored:
    """What a pass found of one sample."""

    log_probs: list[float]  # of its response tokens
    experts: np.ndarray | None = None  # int16 [P + R, MoE layers, top-k] that each token went to, where recorded


@torch.no_grad()
def compute_log_probs(
    model: FrozenModel,
    samples: list[Sample],
    batcher: Batcher,
    *,
    temperature: float,
    record: bool = False,
    replay: bool = False,
) -> list[Scored]:
    """Log-probs of every response token of every sample, under softmax(logits / temperature).

    record: also return the experts that every token was routed to; replay: route as the samples' routed_experts say.
    Every rank passes the same samples and gets the same result, in their order. Collective.
    """
    world = model.world
    # Without loss masks, which would leave out response tokens.
    bare = [
        Sample(
            token_ids=sample.token_ids,
            prompt_length=sample.prompt_length,
            routed_experts=sample.routed_experts if replay else None,
        )
        for sample in samples
    ]
    mine = batcher(bare)
    for chunk in model.chunks:
        chunk.eval()
    outputs = model.run_schedule(mine, _LogProbs(temperature), forward_only=True, record=record)
    found: dict[int, list[float]] = {}
    for output, batch in zip(outputs, mine if outputs else [], strict=True):
        # Each context rank knows its tokens, and 0 of the others'.
        found.update(unpad(world.sum_over_context(output["log_probs"]), batch, bare))
    experts = _recorded(model, mine, bare) if record else {}
    everywhere: dict[int, Scored] = {}
    for log_probs, routed in world.all_gather_replicas((from_last_stage(found, world), experts)):
        everywhere.update({i: Scored(values, routed.get(i)) for i, values in log_probs.items()})
    return [everywhere[i] for i in range(len(samples))]


def _recorded(model: FrozenModel, batches: list[MicroBatch], samples: list[Sample]) -> dict[int, np.ndarray]:
    """Experts of every token of this replica's samples, in all layers, on all ranks of the replica. Collective."""
    world, taps = model.world, model.taps
    tensor_group = world.tensor_group if world.layout.shards_sequence else None
    found: dict[int, np.ndarray] = {}
    for batch, experts_NLk in zip(batches, taps.recorded(), strict=True):
        every_layer = taps.all_layers(experts_NLk, world.pipeline_group)
        rows_BTKk = _whole_sequences(whole_rows(every_layer, len(batch.tokens_BT), tensor_group), batch, world)
        for n, index in enumerate(batch.sample_indices):
            row, start = (n, 0) if batch.bounds is None else (0, batch.bounds[n])
            found[index] = rows_BTKk[row, start : start + len(samples[index].token_ids)].numpy()
    return found


def _whole_sequences(values_BTKk: torch.Tensor, batch: MicroBatch, world: World) -> torch.Tensor:
    """All context ranks' tokens in the order of the rows, int16 on the CPU. Collective."""
    size = world.layout.context
    if size == 1:
        return values_BTKk.cpu()
    mine = values_BTKk.int().contiguous()  # no backend sends int16
    parts = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(parts, mine, group=world.context_group)
    length = size * mine.shape[1]
    whole = torch.empty(mine.shape[0], length, *mine.shape[2:], dtype=torch.int16)
    for rank, part in enumerate(parts):
        whole[:, zigzag(batch.bounds or [0, length], size, rank)] = part.cpu().short()
    return whole


def from_last_stage(value: Value, world: World) -> Value:
    """What the last pipeline stage has, on all ranks of its pipeline. Collective."""
    if world.layout.pipeline == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=world.last_stage_rank, group=world.pipeline_group)
    return box[0]
