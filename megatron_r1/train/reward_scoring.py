"""A reward model that scores in this process: sequences through Megatron's schedule, one value each, on all ranks.

What `train/log_probs.py` is for log-probs. `train/reward_models.py` scores completions of a `grpo` stage with it, and
`pipeline/outputs/serve.py` answers requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_r1.checkpoint import folders
from megatron_r1.config.model import ModelConfig
from megatron_r1.data.batching import MicroBatch
from megatron_r1.data.reward_rows import answer_sequence
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.model.parked import Parked
from megatron_r1.model.precision import row_multiple
from megatron_r1.model.presets import Architecture
from megatron_r1.parallel.world import World
from megatron_r1.train.frozen import FrozenModel
from megatron_r1.train.log_probs import from_last_stage
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.scoring import score_sequences
from megatron_r1.train.start import load_start
from megatron_r1.types import Sample


@dataclass(frozen=True, slots=True)
class _Values:
    """An objective without a loss: the last stage returns values [N], 0 for sequences that end on another rank."""

    metric_names: tuple[str, ...] = ()
    maximum_names: tuple[str, ...] = ()

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        return score_sequences(model, batch)

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> Any:
        held_N = batch.last_N >= 0
        values_N = output.new_zeros(held_N.shape).masked_scatter(held_N, output)
        zero = output.new_zeros(())
        return zero, zero.to(torch.int), {"values": values_N}


@torch.no_grad()
def compute_values(model: FrozenModel, samples: Sequence[Sample], batcher: Batcher) -> list[float]:
    """The value of every sequence, in float32, at its last token.

    model: with a scalar head. Every rank passes the same samples and gets the same values, in their order. Collective.
    """
    if not samples:
        return []
    world = model.world
    mine = batcher(samples)
    for chunk in model.chunks:
        chunk.eval()
    outputs = model.run_schedule(mine, _Values(), forward_only=True)
    found: dict[int, float] = {}
    for output, batch in zip(outputs, mine if outputs else [], strict=True):
        # Under context parallelism one rank holds a sequence's last token; the others add 0.
        values = world.sum_over_context(output["values"]).tolist()
        found.update(zip(batch.sample_indices, values, strict=True))
    everywhere: dict[int, float] = {}
    for part in world.all_gather_replicas(from_last_stage(found, world)):
        everywhere.update(part)
    return [everywhere[i] for i in range(len(samples))]


@dataclass(frozen=True, slots=True)
class RewardScorer:
    """A reward model with what its sequences are written with."""

    model: FrozenModel
    tokenizer: Tokenizer
    template: str  # that it was trained under
    batcher: Batcher
    parked: Parked | None  # between two calls the weights wait in host memory; None: they stay on the device

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        model: ModelConfig,
        arch: Architecture,
        world: World,
        tokenizer: Tokenizer,
        *,
        template: str,
        micro_batch_tokens: int,
        packed: bool,
        parked: bool,
    ) -> RewardScorer:
        """The reward model of a checkpoint. Collective. Raises UserError where that holds none."""
        folders.require_reward_model(checkpoint)
        frozen = FrozenModel(arch, model, world, scalar_head=True)
        load_start(checkpoint, frozen)
        batcher = Batcher(world, micro_batch_tokens, tokenizer.pad_id, packed, row_multiple(model.precision))
        waits = Parked(frozen.models, world.device) if parked else None
        return cls(frozen, tokenizer, template, batcher, waits)

    def sequence(self, question: str, answer: str) -> tuple[Sample, bool]:
        """What the model reads, and whether it was cut.

        One that is longer than the model has positions loses the end of its answer and keeps its end-of-sequence token,
        at which it is scored. Raises UserError for a text that the tokenizer cannot encode.
        """
        sample = answer_sequence(self.tokenizer, self.template, question, answer)
        most = int(self.model.arch["max_position_embeddings"])
        if len(sample.token_ids) <= most:
            return sample, False
        kept = [*sample.token_ids[: most - 1], sample.token_ids[-1]]
        return replace(sample, token_ids=kept, prompt_length=min(sample.prompt_length, most - 1)), True

    def values(self, samples: Sequence[Sample]) -> list[float]:
        """As `compute_values`."""
        with nullcontext() if self.parked is None else self.parked.in_place():
            return compute_values(self.model, samples, self.batcher)
