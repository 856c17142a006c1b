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
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.data.batching import MicroBatch
from megatron_r1.model.build import build_model, unwrap
from megatron_r1.model.gpt import PolicyModel
from megatron_r1.model.presets import Architecture
from megatron_r1.parallel.world import World
from megatron_r1.train.objectives import Objective


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step reports, equal on all ranks."""

    sums: dict[str, float]  # of the objective, over the whole global batch
    grad_norm: float  # before clipping
    lr: float  # used by this step

    @property
    def is_finite(self) -> bool:
        """Whether every sum and the gradient norm are finite numbers."""
        return all(math.isfinite(x) for x in (*self.sums.values(), self.grad_norm))


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
        mtp_loss: float = 0.1,
        train_mtp: bool = True,
        expert_bias_frozen: bool = False,
    ) -> None:
        self.arch, self.world = arch, world
        self.step = 0  # optimizer steps taken; also the version of the weights
        chunks = build_model(arch, model, world, mtp_loss=mtp_loss)
        self.config = unwrap(chunks[0]).config
        if expert_bias_frozen:
            self.config.moe_router_bias_update_rate = 0.0
        if not train_mtp:
            _freeze_mtp(chunks)
        self.chunks = _data_parallel(chunks, self.config, world)
        self.optimizer = _optimizer(optimizer, model, self.chunks, world)
        self.schedule = _schedule(self.optimizer, optimizer, steps)
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
        sums = self._reduce(outputs, objective.metric_names)
        lr = float(self.optimizer.param_groups[0]["lr"])
        _, grad_norm, _ = self.optimizer.step()
        self.schedule.step(1)
        self.step += 1
        return StepResult(sums=sums, grad_norm=float(grad_norm), lr=lr)

    def run_schedule(self, batches: Sequence[MicroBatch], objective: Objective, *, forward_only: bool) -> list[Any]:
        """Megatron's pipeline schedule over these micro-batches; the last stage's results, [] elsewhere."""

        def forward_step(batch_iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            batch = next(batch_iterator)
            return objective.forward(chunk, batch), partial(_call_loss, objective, batch)

        iterators = [iter(batches) for _ in self.chunks]
        many = len(self.chunks) > 1
        rows, length = batches[0].tokens_BT.shape
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if many else iterators[0],
            model=self.chunks if many else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    def _reduce(self, outputs: list[dict[str, torch.Tensor]], names: Sequence[str]) -> dict[str, float]:
        """Sum the metrics over micro-batches, replicas and context ranks; tell every pipeline stage."""
        total = torch.zeros(len(names), dtype=torch.float64, device=self.world.device)
        if self.world.is_last_stage and self.world.tensor_rank == 0:
            for sums in outputs:
                total += torch.stack([sums[name].detach().double() for name in names])
        dist.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))


def _call_loss(objective: Objective, batch: MicroBatch, output: torch.Tensor) -> Any:
    return objective.loss(output, batch)


def _freeze_mtp(chunks: list[torch.nn.Module]) -> None:
    for chunk in chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            if name.startswith("mtp."):
                parameter.requires_grad = False


def _data_parallel(chunks: list[torch.nn.Module], config: Any, world: World) -> list[DistributedDataParallel]:
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=world.layout.distributed_optimizer,
        overlap_grad_reduce=world.layout.overlap_grad_reduce,
    )
    wrapped = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def _optimizer(
    optimizer: OptimizerConfig, model: ModelConfig, chunks: list[DistributedDataParallel], world: World
) -> Any:
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=model.precision == "bf16",
        params_dtype=unwrap(chunks[0]).config.params_dtype,
        use_distributed_optimizer=world.layout.distributed_optimizer,
    )
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=world.device.type != "cpu")


def _schedule(megatron_optimizer: Any, optimizer: OptimizerConfig, steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=optimizer.warmup_steps,
        lr_decay_steps=max(steps, optimizer.warmup_steps + 1),
        lr_decay_style=optimizer.schedule,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        # The recipe rules, also after a resume: a user may lower the learning rate of a run that diverged.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
