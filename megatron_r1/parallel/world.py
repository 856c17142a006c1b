"""Start the process groups of a layout and hand them out as one frozen object.

Everything above this module takes its groups from a `World`; only this module asks Megatron's global state.
"""

from __future__ import annotations

import datetime
import gc
import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.validate import check_world
from megatron_r1.parallel import cpu_backend

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class World:
    """This process's place in the layout, and the groups it communicates in."""

    rank: int
    size: int
    layout: ParallelConfig
    device: torch.device
    tensor_rank: int
    pipeline_rank: int
    data_rank: int  # which share of a batch; context-parallel ranks split the sequences of one share
    data_size: int
    context_rank: int
    tensor_group: Any
    pipeline_group: Any
    context_group: Any
    data_context_group: Any  # the copies of one shard of the weights (DP x CP): gradients are summed over it
    expert_group: Any  # ranks among which tokens travel to experts (EP x ETP), copies included
    model_group: Any  # every rank of one copy of the dense weights (TP x PP)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer."""
        return self.pipeline_rank == self.layout.pipeline - 1

    @property
    def replicas(self) -> int:
        """Copies of the dense weights (DP x CP). Each samples on its own; in training context ranks share samples."""
        return self.data_size * self.layout.context

    @property
    def replica_rank(self) -> int:
        """Which copy of the dense weights this rank belongs to."""
        return self.data_rank * self.layout.context + self.context_rank

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for its replica (first tensor and pipeline rank)."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage of this rank's pipeline."""
        return dist.get_process_group_ranks(self.pipeline_group)[-1]

    def all_gather_replicas(self, value: Any) -> list[Any]:
        """Every replica's `value` (any picklable object), in replica order, on all ranks."""
        parts: list[Any] = [None] * self.replicas
        dist.all_gather_object(parts, value, group=self.data_context_group)
        return parts

    def broadcast_in_replica(self, value: Any) -> Any:
        """The leader's `value` on all ranks of its replica."""
        box = [value]
        source = dist.get_process_group_ranks(self.model_group)[0]
        dist.broadcast_object_list(box, src=source, group=self.model_group)
        return box[0]

    def broadcast_from_0(self, value: Any) -> Any:
        """Rank 0's `value` (any picklable object) on all ranks. Collective."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum_over_context(self, value: torch.Tensor) -> torch.Tensor:
        """`value` added up over the ranks that hold slices of the same sequences; without gradient. Collective."""
        if self.layout.context == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total, group=self.context_group)
        return total

    def max_over_context(self, value: torch.Tensor) -> torch.Tensor:
        """The largest of the context ranks' values, elementwise; without gradient. Collective."""
        if self.layout.context == 1:
            return value
        largest = value.detach().clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.context_group)
        return largest

    def any(self, flag: bool) -> bool:
        """Whether any rank of the world says True. A collective: every rank must call it."""
        tensor = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    def largest(self, value: float) -> float:
        """The largest rank's value, on every rank (seconds of the slowest one). A collective."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor.item())


def environment() -> tuple[int, int]:
    """(rank, world size) as torchrun or the launcher set them; (0, 1) outside of both."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start(layout: ParallelConfig, seed: int, timeout_minutes: int = 30) -> World:
    """Join the world, build Megatron's groups, seed its generators. Collective.

    Raises UserError when the started processes do not fit the layout.
    """
    on_cpu = cpu_backend.install()
    from megatron.core import parallel_state

    rank, size = environment()
    check_world(layout, size)
    if not dist.is_initialized():
        _init_process_group(rank, size, on_cpu, timeout_minutes)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=not on_cpu,
        distributed_timeout_minutes=timeout_minutes,
    )
    seed_generators(seed)
    if rank == 0 and on_cpu:
        logger.info(cpu_backend.describe())
    return World(
        rank=rank,
        size=size,
        layout=layout,
        device=torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device()),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=size // layout.model_size,
        context_rank=parallel_state.get_context_parallel_rank(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        data_context_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert_group=parallel_state.get_expert_tensor_and_model_parallel_group(),
        model_group=parallel_state.get_model_parallel_group(),
    )


def seed_generators(seed: int) -> None:
    """Seed torch's and Megatron's generators, as every stage of a run does first: what it draws does not depend on
    whether the stages before it ran in this process.
    """
    from megatron.core import parallel_state, tensor_parallel

    # A pipeline stage draws other weights than its neighbour. The stride is larger than Megatron's offsets for tensor
    # and expert ranks (2718, 1024 + 100 a rank), else an expert of one stage would equal one of another.
    seed += 100_000 * parallel_state.get_pipeline_model_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)


def stop() -> None:
    """Destroy every group; afterwards `start` may build another layout in the same processes.

    Without destroying the groups each layout would leave some sixty gloo threads behind.
    """
    from megatron.core import parallel_state

    if not dist.is_initialized():
        return
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    parallel_state._global_process_group_list = None
    gc.collect()  # models hold groups; their threads end with them


def _init_process_group(rank: int, size: int, on_cpu: bool, timeout_minutes: int) -> None:
    if "MASTER_ADDR" not in os.environ:
        if size > 1:
            raise UserError("WORLD_SIZE is set but MASTER_ADDR is not: start the ranks with torchrun or srun")
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    if not on_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
    dist.init_process_group(
        backend="gloo" if on_cpu else "cpu:gloo,cuda:nccl",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
