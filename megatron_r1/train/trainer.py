"""A model with its optimizer: one optimizer step over micro-batches, through Megatron's own schedule.

Used by every loop of this folder. The schedule (`get_forward_backward_func`), gradient reduction
(DistributedDataParallel), optimizer (distributed Adam with fp32 master weights), clipping and learning-rate schedule
are Megatron-Core's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.data.batching import MicroBatch
from megatron_r1.model import routing_stats
from megatron_r1.model.build import build_model, unwrap
from megatron_r1.model.gpt import PolicyModel
from megatron_r1.model.presets import Architecture
from megatron_r1.model.routing import RoutingTaps, local_tokens
from megatron_r1.parallel.world import World
from megatron_r1.train.objectives import Objective
from megatron_r1.train.optimizer import build_optimizer, build_schedule, data_parallel, take_step


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step reports, equal on all ranks."""

    sums: dict[str, float]  # of the objective, over the whole global batch
    maxima: dict[str, float]  # of the objective, likewise
    grad_norm: float  # before clipping
    lr: float  # used by this step
    routing: dict[str, float]  # metrics of the router; empty without experts

    @property
    def is_finite(self) -> bool:
        """Whether every sum, maximum and the gradient norm are finite numbers."""
        return all(math.isfinite(x) for x in (*self.sums.values(), *self.maxima.values(), self.grad_norm))


class Trainer:
    """Model chunks under DistributedDataParallel, their optimizer and schedule."""

    def __init__(
        self,
        arch: Architecture,
        model: ModelConfig,
        world: World,
        optimizer: OptimizerConfig,
        steps: int,
        *,
        train_mtp: bool = True,
        expert_bias_frozen: bool = False,
        scalar_head: bool = False,
    ) -> None:
        self.arch, self.world = arch, world
        self.step = 0  # optimizer steps taken; also the version of the weights
        chunks = build_model(arch, model, world, scalar_head=scalar_head)
        self.config = unwrap(chunks[0]).config
        if expert_bias_frozen:
            self.config.moe_router_bias_update_rate = 0.0
        # Tokens beyond the next one that training predicts too.
        self.mtp_depths = int(self.config.mtp_num_layers or 0) if train_mtp else 0
        if not train_mtp:
            _freeze_mtp(chunks)
        self.taps = RoutingTaps(chunks)
        self.chunks = data_parallel(chunks, self.config, world, optimizer)
        self.optimizer = build_optimizer(optimizer, model, self.chunks, world)
        self.schedule = build_schedule(self.optimizer, optimizer, steps)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        if world.layout.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    @property
    def models(self) -> list[PolicyModel]:
        """The bare models, one a virtual stage."""
        return [unwrap(chunk) for chunk in self.chunks]

    def train_step(self, batches: Sequence[MicroBatch], objective: Objective) -> StepResult:
        """One optimizer step over this replica's micro-batches. Collective.

        Every replica passes the same number of micro-batches. The result's sums cover the global batch.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self.run_schedule(batches, objective, forward_only=False)
        sums = self._reduce(outputs, objective.metric_names, dist.ReduceOp.SUM)
        maxima = self._reduce(outputs, objective.maximum_names, dist.ReduceOp.MAX)
        lr = float(self.optimizer.param_groups[0]["lr"])
        grad_norm = take_step(self.optimizer, self.chunks)
        self.schedule.step(1)
        self.step += 1
        return StepResult(sums, maxima, grad_norm=grad_norm, lr=lr, routing=self._routing())

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

    def _routing(self) -> dict[str, float]:
        if not self.taps.model_layers:
            return {}
        # Without sequence parallelism the tensor-parallel ranks route the same tokens.
        own_tokens = self.world.layout.shards_sequence or self.world.tensor_rank == 0
        stats = routing_stats.reduce(self.taps.collect(), self.taps.model_layers, self.world.device, own_tokens)
        return routing_stats.metrics(stats)

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


def _freeze_mtp(chunks: list[torch.nn.Module]) -> None:
    for chunk in chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            if name.startswith("mtp."):
                parameter.requires_grad = False
