"""A model that is run and not trained: through Megatron's own schedule, or by a rollout engine.

`train/trainer.py` adds gradients and updates. Evaluations, sampling stages, reward models that score and teachers are
this alone, without the optimizer's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_r1.config.model import ModelConfig
from megatron_r1.data.batching import MicroBatch
from megatron_r1.model.build import build_model, unwrap
from megatron_r1.model.gpt import PolicyModel
from megatron_r1.model.presets import Architecture
from megatron_r1.model.routing import RoutingTaps, local_tokens
from megatron_r1.parallel.world import World
from megatron_r1.train.objectives import Objective


class FrozenModel:
    """Model chunks of this rank, with the taps at their routers.

    Args:
        arch: the keys of a Hugging Face config.json.
        model: precision, recomputation, Megatron's own fields.
        world: this rank's groups.
        scalar_head: a reward model, with one value a sequence in place of the output layer.
        trained: gradients will be asked for.
    """

    def __init__(
        self, arch: Architecture, model: ModelConfig, world: World, *, scalar_head: bool = False, trained: bool = False
    ) -> None:
        self.arch, self.world = arch, world
        self.step = 0  # optimizer steps taken; also the version of the weights
        self.chunks: list[torch.nn.Module] = build_model(arch, model, world, scalar_head=scalar_head)
        self.config = unwrap(self.chunks[0]).config
        if not trained:
            for chunk in self.chunks:
                chunk.requires_grad_(False)
        self.taps = RoutingTaps(self.chunks)

    @property
    def models(self) -> list[PolicyModel]:
        """The bare models, one a virtual stage."""
        return [unwrap(chunk) for chunk in self.chunks]

    def weights_changed(self) -> None:
        """Called after weights were loaded."""

    @torch.no_grad()
    def measure(self, batches: Sequence[MicroBatch], objective: Objective) -> dict[str, float]:
        """The objective's sums over the global batch, without a step; equal on all ranks. Collective."""
        for chunk in self.chunks:
            chunk.eval()
        return self._reduce(
            self.run_schedule(batches, objective, forward_only=True), objective.metric_names, dist.ReduceOp.SUM
        )

    def run_schedule(
        self, batches: Sequence[MicroBatch], objective: Objective, *, forward_only: bool, record: bool = False
    ) -> list[Any]:
        """Megatron's pipeline schedule over these micro-batches; the last stage's results, [] elsewhere.

        record: keep the routers' choices, for `taps.recorded()`.
        """

        def forward_step(batch_iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            batch = next(batch_iterator)
            self._announce(batch, record)
            return objective.forward(chunk, batch), partial(_call_loss, objective, batch)

        iterators = [iter(batches) for _ in self.chunks]
        many = len(self.chunks) > 1
        rows, length = batches[0].tokens_BT.shape
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if many else iterators[0],
            model=self.chunks if many else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=length * self.world.layout.context,  # of the whole rows
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    def _announce(self, batch: MicroBatch, record: bool) -> None:
        """Tell the routers which of their tokens are padding, and which experts to replay."""
        if not self.taps.model_layers:
            return
        size = self.world.layout.tensor if self.world.layout.shards_sequence else 1
        rank = self.world.tensor_rank if size > 1 else 0
        experts = batch.experts_BTKk
        self.taps.begin(
            local_tokens(batch.valid_BT, rank, size),
            None if experts is None else local_tokens(experts, rank, size),
            record=record,
        )

    def _reduce(self, outputs: list[dict[str, torch.Tensor]], names: Sequence[str], operation: Any) -> dict[str, float]:
        """The metrics over micro-batches, replicas and context ranks, known to every pipeline stage.

        Every one is at least 0 where it is reduced by maximum: ranks without a result count as 0.
        """
        if not names:
            return {}
        total = torch.zeros(len(names), dtype=torch.float64, device=self.world.device)
        if self.world.is_last_stage and self.world.tensor_rank == 0:
            rows = torch.stack([torch.stack([row[name].detach().double() for name in names]) for row in outputs])
            total = rows.amax(0) if operation == dist.ReduceOp.MAX else rows.sum(0)
        dist.all_reduce(total, op=operation)
        return dict(zip(names, total.tolist(), strict=True))


def _call_loss(objective: Objective, batch: MicroBatch, output: torch.Tensor) -> Any:
    return objective.loss(output, batch)
