"""A model with its optimizer: one optimizer step over micro-batches, through Megatron's own schedule.

Used by every loop of this folder. The schedule (`get_forward_backward_func`), gradient reduction
(DistributedDataParallel), optimizer (distributed Adam with fp32 master weights), clipping and learning-rate schedule
are Megatron-Core's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.data.batching import MicroBatch
from megatron_r1.model import routing_stats
from megatron_r1.model.build import unwrap
from megatron_r1.model.presets import Architecture
from megatron_r1.parallel.world import World
from megatron_r1.train.frozen import FrozenModel
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


class Trainer(FrozenModel):
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
        super().__init__(arch, model, world, scalar_head=scalar_head, trained=True)
        if expert_bias_frozen:
            self.config.moe_router_bias_update_rate = 0.0
        # Tokens beyond the next one that training predicts too.
        self.mtp_depths = int(self.config.mtp_num_layers or 0) if train_mtp else 0
        if not train_mtp:
            _freeze_mtp(self.chunks)
        self.chunks = [*data_parallel(self.chunks, self.config, world, optimizer)]
        self.optimizer = build_optimizer(optimizer, model, self.chunks, world)
        self.schedule = build_schedule(self.optimizer, optimizer, steps)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        if world.layout.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def weights_changed(self) -> None:
        """The optimizer's master weights follow."""
        self.optimizer.reload_model_params()

    def train_step(self, batches: Sequence[MicroBatch], objective: Objective) -> StepResult:
        """One optimizer step over this replica's micro-batches. Collective.

        Every replica passes the same number of micro-batches. The result's sums cover the global batch.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()  # type: ignore[operator]  # they are DistributedDataParallel
        self.optimizer.zero_grad()
        outputs = self.run_schedule(batches, objective, forward_only=False)
        sums = self._reduce(outputs, objective.metric_names, dist.ReduceOp.SUM)
        maxima = self._reduce(outputs, objective.maximum_names, dist.ReduceOp.MAX)
        lr = float(self.optimizer.param_groups[0]["lr"])
        grad_norm = take_step(self.optimizer, self.chunks)
        self.schedule.step(1)
        self.step += 1
        return StepResult(sums, maxima, grad_norm=grad_norm, lr=lr, routing=self._routing())

    def _routing(self) -> dict[str, float]:
        if not self.taps.model_layers:
            return {}
        # Without sequence parallelism the tensor-parallel ranks route the same tokens.
        own_tokens = self.world.layout.shards_sequence or self.world.tensor_rank == 0
        stats = routing_stats.reduce(self.taps.collect(), self.taps.model_layers, self.world.device, own_tokens)
        return routing_stats.metrics(stats)


def _freeze_mtp(chunks: list[torch.nn.Module]) -> None:
    for chunk in chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            if name.startswith("mtp."):
                parameter.requires_grad = False
