"""The parts of a trainer that own gradients and updates: data parallelism, Adam, the learning-rate schedule.

`train/trainer.py` wraps the built model chunks with `data_parallel`, then makes their optimizer and its schedule here,
and updates the parameters with `take_step`. All three are Megatron-Core's; this module turns the recipe's tables into
their configurations.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.model.megatron_config import resolve_dtypes
from megatron_r1.model.precision import bf16_parameters
from megatron_r1.parallel.world import World


def data_parallel(
    chunks: list[torch.nn.Module], config: Any, world: World, optimizer: OptimizerConfig
) -> list[DistributedDataParallel]:
    """Megatron's DistributedDataParallel around each model chunk, parameters made equal over replicas. Collective.

    Args:
        chunks: this rank's model chunks, from `model.build.build_model`.
        config: their TransformerConfig.
        world: the groups; its layout says whether the optimizer is sharded and whether reduction overlaps.
        optimizer: main_grads_dtype of its `megatron` table is the dtype of the gradient buffers, fp32 by default.
    """
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=optimizer.megatron.get("main_grads_dtype", "fp32") == "fp32",
        use_distributed_optimizer=world.layout.distributed_optimizer,
        overlap_grad_reduce=world.layout.overlap_grad_reduce,
    )
    wrapped = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build_optimizer(
    optimizer: OptimizerConfig, model: ModelConfig, chunks: list[DistributedDataParallel], world: World
) -> Any:
    """Megatron's optimizer (Adam, fp32 master weights where parameters are bf16) over wrapped chunks. Collective.

    Raises UserError as `optimizer_config` does.
    """
    config = optimizer_config(optimizer, model, world)
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=world.device.type != "cpu")


def optimizer_config(
    optimizer: OptimizerConfig, model: ModelConfig, world: World, table: str = "stage.optimizer.megatron"
) -> MegatronOptimizerConfig:
    """Megatron's configuration of the optimizer on this rank's device. Builds nothing.

    Raises UserError for a combination of the `megatron` table, called `table` in the message, that Megatron-Core
    refuses, or that needs a GPU.
    """
    if optimizer.megatron.get("optimizer_cpu_offload") and world.device.type == "cpu":
        raise UserError(
            f"{table}: optimizer_cpu_offload moves optimizer state from a GPU to the CPU, and this run "
            "has no GPU (Megatron-Core's HybridDeviceOptimizer fails without one); leave it out here"
        )
    bf16 = bf16_parameters(model.precision)
    fields: dict[str, Any] = dict(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=bf16,
        fp8_recipe="blockwise" if model.precision == "fp8-blockwise" else None,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=world.layout.distributed_optimizer,
    )
    fields.update(resolve_dtypes(optimizer.megatron, MegatronOptimizerConfig))
    try:
        return MegatronOptimizerConfig(**fields)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"Megatron-Core refuses {table} {optimizer.megatron}: {error}") from error


def take_step(megatron_optimizer: Any, chunks: list[DistributedDataParallel]) -> float:
    """One update of the parameters, on all ranks; returns the gradient norm before clipping. Collective.

    A model with experts has two optimizers, and Megatron-Core 0.16.1 lets each gather the parameters of both. The flag
    (made for an overlap that is not used here) holds their gathers back; one at the end does.
    """
    for chunk in chunks:
        chunk.overlap_param_gather_with_optimizer_step = True
    _, grad_norm, _ = megatron_optimizer.step()
    for chunk in chunks:
        chunk.overlap_param_gather_with_optimizer_step = False
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync()
    return float(grad_norm)


def build_schedule(megatron_optimizer: Any, optimizer: OptimizerConfig, steps: int) -> OptimizerParamScheduler:
    """Learning rate: linear warm-up from 0, then the recipe's decay to min_lr at step `steps`; constant weight decay.

    Call its `step(1)` after each optimizer step. The recipe rules, also over a loaded checkpoint.
    """
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
        # Also after a resume: a user may lower the learning rate of a run that diverged.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
