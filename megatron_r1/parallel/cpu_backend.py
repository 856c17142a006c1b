"""Run the real Megatron-Core 0.16.1 on CPU processes with gloo, when there is no accelerator.

Megatron-Core names CUDA in places that have nothing to do with its mathematics: where a scratch tensor is
allocated, which random generator is saved, which string a tensor's type prints as. This module redirects those
names, and nothing else, one by one; `PATCHES` lists each with its reason and a test pins the list. On a machine
with a GPU `install` returns at once and nothing here takes effect.

Called once, by `parallel.world.start`, before anything of Megatron is built.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

# Where "the current device" is. The layout planner may point this at the meta device.
device = torch.device("cpu")

MODULES_WITH_DEVICE_LITERALS = (
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "pipeline_parallel.schedules",
    "utils",
    "models.common.embeddings.rope_utils",
    "transformer.moe.moe_utils",
    "transformer.utils",
    "tensor_parallel.data",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
)
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like")


@dataclass(frozen=True, slots=True)
class Patch:
    """One redirected name and why Megatron-Core needs it on a CPU."""

    name: str
    reason: str
    apply: Callable[[], None]


def is_needed() -> bool:
    """Whether this machine has no accelerator that Megatron-Core could use."""
    return not torch.cuda.is_available()


def install() -> bool:
    """Apply every patch once. Returns whether the CPU backend is active (False on a machine with a GPU)."""
    if not is_needed():
        return False
    if not getattr(torch.cuda, "_megatron_r1_cpu_backend", False):
        from torch._dynamo import config as compiler

        compiler.disable = True  # also what a Megatron import has decorated already
        for patch in PATCHES:
            patch.apply()
        torch.cuda._megatron_r1_cpu_backend = True  # type: ignore[attr-defined]
    return True


def describe() -> str:
    """The line for the log."""
    return (
        f"CPU backend active: {len(PATCHES)} Megatron-Core names redirected from CUDA to the CPU "
        "(megatron_r1/parallel/cpu_backend.py lists them); its mathematics is untouched"
    )


# ---- A. torch.cuda: where tensors live, streams, the generator


class _Event:
    """All CPU work is synchronous, so an event is always complete."""

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def record(self, *_: Any) -> None:
        return

    def wait(self, *_: Any) -> None:
        return

    def synchronize(self) -> None:
        return

    def query(self) -> bool:
        return True

    def elapsed_time(self, *_: Any) -> float:
        return 0.0


class _Stream:
    """All CPU work is synchronous, so waiting for a stream is nothing.

    A class, as the name it replaces: other libraries write `torch.cuda.Stream | None`.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def wait_stream(self, *_: Any) -> None:
        return

    def wait_event(self, *_: Any) -> None:
        return

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        return

    def query(self) -> bool:
        return True


_STREAM = _Stream()


def _cuda(name: str, reason: str, value: Any) -> Patch:
    return Patch(f"torch.cuda.{name}", reason, lambda: setattr(torch.cuda, name, value))


# ---- B. the random-number tracker


def _cpu_rng_tracker(random: Any) -> type:
    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):  # type: ignore[misc,name-defined]
        """Megatron's tracker on the CPU generator, whose state any host code may move between forks."""

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outside = torch.get_rng_state()
            previous: str = self._current_state_name
            nested = previous != "default-rng"
            if nested:
                self.states_[previous] = outside
            torch.set_rng_state(self.states_[name])
            self._current_state_name: str = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_[previous] if nested else outside)
                self._current_state_name = previous

    return CpuRNGStatesTracker


def _patch_rng_get() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()


def _patch_rng_set() -> None:
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _patch_rng_tracker() -> None:
    from megatron.core.tensor_parallel import random

    random.CudaRNGStatesTracker = _cpu_rng_tracker(random)


# ---- C. device literals inside ten modules


class _TorchOnCpu:
    """Stands for the name `torch` in a Megatron module: the same functions, with device="cuda" dropped."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return _without_cuda(value) if name in FACTORIES else value


def _without_cuda(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        where = kwargs.get("device")
        if where is not None and torch.device(where).type == "cuda":
            kwargs["device"] = device
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _patch_literals(module: str) -> Patch:
    def apply() -> None:
        importlib.import_module(f"megatron.core.{module}").torch = _TorchOnCpu()  # type: ignore[attr-defined]

    return Patch(f"megatron.core.{module}.torch", 'allocates with device="cuda" or pinned memory', apply)


def _patch_tensor_cuda() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]


def _patch_tensor_type() -> None:
    stock = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        return "torch.cuda." + result.rsplit(".", 1)[-1] if isinstance(result, str) else result

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


# ---- D. names that 0.16.1 leaves half-imported without Transformer Engine


def _patch_te_gemm() -> None:
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _patch_mla_te_flag() -> None:
    from megatron.core.transformer import multi_latent_attention as mla

    if not isinstance(mla.TELinear, type):
        mla.HAVE_TE = False


# ---- E. expert dispatch


def _patch_split_sizes() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host


def _patch_uneven_gather() -> None:
    from megatron.core.tensor_parallel import mappings

    stock = mappings._gather_along_first_dim

    def gather(
        x: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return stock(x, group, None, use_global_buffer)
        sizes = [int(n) for n in output_split_sizes]
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    mappings._gather_along_first_dim = gather


def _patch_uneven_scatter() -> None:
    from megatron.core.tensor_parallel import mappings

    stock = mappings._reduce_scatter_along_first_dim

    def reduce_scatter(
        x: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return stock(x, group, None, use_global_buffer)
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return torch.split(total, [int(n) for n in input_split_sizes])[group.rank()].contiguous()

    mappings._reduce_scatter_along_first_dim = reduce_scatter


# ---- F. the distributed optimizer on torch's AdamW


def _patch_adam_step() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    stock = DistributedOptimizer._set_main_param_and_optimizer_states

    def keep_step(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = {"step": state["step"]} if "step" in state else {}
        return stock(self, model_param, {**step, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = keep_step


PATCHES: tuple[Patch, ...] = (
    _cuda("current_device", "scratch tensors are allocated on it", lambda: device),
    _cuda("synchronize", "nothing runs asynchronously on the CPU", lambda *_, **__: None),
    _cuda("Stream", "the expert dispatcher makes one", _Stream),
    _cuda("Event", "the expert dispatcher makes one", _Event),
    _cuda("current_stream", "waited on before reductions", lambda *_, **__: _STREAM),
    _cuda("default_stream", "waited on before reductions", lambda *_, **__: _STREAM),
    _cuda("stream", "entered around overlapped copies", lambda *_: contextlib.nullcontext()),
    _cuda("get_rng_state", "saved around recomputed layers", lambda *_, **__: torch.get_rng_state()),
    _cuda("manual_seed", "seeds the tensor-parallel generators", lambda seed: torch.manual_seed(seed)),
    Patch("tensor_parallel.random._get_cuda_rng_state", "reads the CUDA generator", _patch_rng_get),
    Patch("tensor_parallel.random._set_cuda_rng_state", "writes the CUDA generator", _patch_rng_set),
    Patch(
        "tensor_parallel.random.CudaRNGStatesTracker",
        "the stock fork() warns whenever the CPU generator moves between forks",
        _patch_rng_tracker,
    ),
    *(_patch_literals(module) for module in MODULES_WITH_DEVICE_LITERALS),
    Patch("torch.Tensor.cuda", "small index tensors are moved to the GPU", _patch_tensor_cuda),
    Patch(
        "torch.Tensor.type",
        "the optimizers accept only parameters that print as torch.cuda.FloatTensor and the like",
        _patch_tensor_type,
    ),
    Patch(
        "transformer.moe.moe_utils.te_general_gemm",
        "0.16.1 reads the name without Transformer Engine and raises NameError",
        _patch_te_gemm,
    ),
    Patch(
        "transformer.multi_latent_attention.HAVE_TE",
        "0.16.1 leaves it True with a stand-in class, and isinstance() fails",
        _patch_mla_te_flag,
    ),
    Patch(
        "transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
        "split sizes become host integers only where the tensor is on CUDA",
        _patch_split_sizes,
    ),
    Patch(
        "tensor_parallel.mappings._gather_along_first_dim",
        "gloo has no all-gather of uneven parts (expert tensor parallelism)",
        _patch_uneven_gather,
    ),
    Patch(
        "tensor_parallel.mappings._reduce_scatter_along_first_dim",
        "gloo has no reduce-scatter of uneven parts (expert tensor parallelism)",
        _patch_uneven_scatter,
    ),
    Patch(
        "optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states",
        "torch's AdamW keeps `step` as a tensor in its state; loading loses it with KeyError",
        _patch_adam_step,
    ),
)

# @jit_fuser is torch.compile: three to five seconds of C++ compilation per rank at the first step, for nothing on
# a CPU. Set before `import megatron.core` it leaves the functions undecorated; `install` covers a later call.
if is_needed():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
