"""The CPU backend: exactly these names, all of them effective, none of them where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_r1.parallel import cpu_backend
from megatron_r1.parallel.world import World

ROOT = Path(__file__).parents[3]

GOLDEN = [
    "torch.cuda.current_device",
    "torch.cuda.synchronize",
    "torch.cuda.Stream",
    "torch.cuda.Event",
    "torch.cuda.current_stream",
    "torch.cuda.default_stream",
    "torch.cuda.stream",
    "torch.cuda.get_rng_state",
    "torch.cuda.manual_seed",
    "tensor_parallel.random._get_cuda_rng_state",
    "tensor_parallel.random._set_cuda_rng_state",
    "tensor_parallel.random.CudaRNGStatesTracker",
    "megatron.core.optimizer.optimizer.torch",
    "megatron.core.optimizer.clip_grads.torch",
    "megatron.core.pipeline_parallel.schedules.torch",
    "megatron.core.utils.torch",
    "megatron.core.models.common.embeddings.rope_utils.torch",
    "megatron.core.transformer.moe.moe_utils.torch",
    "megatron.core.transformer.utils.torch",
    "megatron.core.tensor_parallel.data.torch",
    "megatron.core.dist_checkpointing.exchange_utils.torch",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver.torch",
    "torch.Tensor.cuda",
    "torch.Tensor.type",
    "transformer.moe.moe_utils.te_general_gemm",
    "transformer.multi_latent_attention.HAVE_TE",
    "transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
    "tensor_parallel.mappings._gather_along_first_dim",
    "tensor_parallel.mappings._reduce_scatter_along_first_dim",
    "optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states",
]

# Run in a fresh process: what `install` does to every patched name, with and without a GPU.
PROBE = """
import importlib, logging, os, torch

def look(name):
    path = name if name.startswith(("torch.", "megatron.")) else "megatron.core." + name
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:cut]))
            break
        except ModuleNotFoundError:
            continue
    for part in parts[cut:-1]:
        owner = getattr(owner, part)
    return getattr(owner, parts[-1], "absent")

from megatron.core.fusions import fused_bias_swiglu  # decorated with torch.compile, before the backend can say no
has_gpu = torch.cuda.is_available
torch.cuda.is_available = lambda: True
from megatron_r1.parallel import cpu_backend
names = [patch.name for patch in cpu_backend.PATCHES]
stock = {name: look(name) for name in names}
print("GPU installed", cpu_backend.install())
print("GPU changed", [name for name in names if look(name) is not stock[name]])
print("GPU dynamo", os.environ.get("TORCHDYNAMO_DISABLE"), torch._dynamo.config.disable)
torch.cuda.is_available = has_gpu
print("CPU installed", cpu_backend.install())
once = {name: look(name) for name in names}
print("CPU unchanged", [name for name in names if once[name] is stock[name]])
cpu_backend.install()
print("second install changed", [name for name in names if look(name) is not once[name]])
fused_bias_swiglu.swiglu(torch.ones(2, 4))
print("frames compiled", sum(torch._dynamo.utils.counters["frames"].values()))
logging.basicConfig(level=logging.INFO, format="LOG %(message)s")
from megatron_r1.config.model import ParallelConfig
from megatron_r1.parallel import world
world.start(ParallelConfig(), seed=1)
world.stop()
"""


@pytest.fixture(scope="module")
def probe() -> str:
    own = ("TORCHDYNAMO_DISABLE", "MASTER_ADDR", "MASTER_PORT")  # of this process's own world
    environment = {k: v for k, v in os.environ.items() if k not in own} | {"CUDA_VISIBLE_DEVICES": ""}
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout + shown.stderr


def test_the_patched_names_are_these() -> None:
    assert [patch.name for patch in cpu_backend.PATCHES] == GOLDEN
    assert Counter(GOLDEN).most_common(1)[0][1] == 1


def test_every_patch_says_why() -> None:
    assert [patch.name for patch in cpu_backend.PATCHES if len(patch.reason.split()) < 3] == []


def test_with_a_gpu_nothing_changes(probe: str) -> None:
    assert "GPU installed False" in probe
    assert "GPU changed []" in probe
    assert "GPU dynamo None False" in probe


def test_without_a_gpu_every_patch_takes_effect_once(probe: str) -> None:
    assert "CPU installed True" in probe
    assert "CPU unchanged []" in probe
    assert "second install changed []" in probe


def test_torch_compile_is_off_even_for_what_was_decorated_before(probe: str) -> None:
    assert "frames compiled 0" in probe


def test_one_line_of_the_log_says_that_it_is_active(probe: str) -> None:
    lines = [line for line in probe.splitlines() if "CPU backend active" in line]
    assert lines == [f"LOG {cpu_backend.describe()}"]
    assert "30 Megatron-Core names" in lines[0]


def test_the_current_device_is_the_cpu(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.current_device() == torch.device("cpu")
    monkeypatch.setattr(cpu_backend, "device", torch.device("meta"))
    assert torch.cuda.current_device() == torch.device("meta")


def test_device_literals_are_redirected_in_the_named_modules_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.optimizer import clip_grads
    from megatron.core.transformer import transformer_layer

    made = clip_grads.torch.tensor([1.5, 2.5], dtype=torch.float64, device="cuda")
    assert (made.device.type, made.dtype, made.tolist()) == ("cpu", torch.float64, [1.5, 2.5])
    assert clip_grads.torch.zeros(2, device="cpu", pin_memory=True).tolist() == [0.0, 0.0]
    assert clip_grads.torch.full((2,), 3, device=torch.device("cuda", 0)).tolist() == [3, 3]
    assert clip_grads.torch.zeros(1, device="meta").device.type == "meta"
    assert clip_grads.torch.matmul is torch.matmul and clip_grads.torch.Tensor is torch.Tensor
    assert transformer_layer.torch is torch
    monkeypatch.setattr(cpu_backend, "device", torch.device("meta"))
    assert clip_grads.torch.zeros(1, device="cuda").device.type == "meta"


def test_tensors_pass_for_cuda_tensors(world: World) -> None:
    x = torch.ones(2)
    assert x.cuda() is x
    assert [x.to(d).type() for d in (torch.float32, torch.float16, torch.bfloat16)] == [
        "torch.cuda.FloatTensor",
        "torch.cuda.HalfTensor",
        "torch.cuda.BFloat16Tensor",
    ]
    assert x.type(torch.float64).dtype == torch.float64


def test_generators_have_their_own_streams_and_leave_the_outer_one(world: World) -> None:
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker()
    saved, outer = tracker.get_states(), torch.get_rng_state()
    names = ["model-parallel-rng", "data-parallel-rng", "expert-parallel-rng"]

    def draw(name: str) -> list[float]:
        with tracker.fork(name):
            return torch.rand(3).tolist()

    first = [draw(name) for name in names]
    assert len({tuple(row) for row in first}) == 3
    assert torch.equal(torch.get_rng_state(), outer)
    torch.rand(5)  # host code that moves the outer generator between forks
    second = [draw(name) for name in names]
    assert all(a != b for a, b in zip(first, second, strict=True)), "a stream goes on where it stopped"
    tracker.set_states(saved)
    torch.set_rng_state(outer)
    assert [draw(name) for name in names] == first
    assert [draw(name) for name in names] == second, "whatever the outer generator did"


def test_a_nested_fork_and_an_error_restore_the_state(world: World) -> None:
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker()
    saved, outer = tracker.get_states(), torch.get_rng_state()
    with tracker.fork("model-parallel-rng"):
        plain = torch.rand(4).tolist()
    tracker.set_states(saved)
    with tracker.fork("model-parallel-rng"):
        nested = torch.rand(2).tolist()
        with tracker.fork("data-parallel-rng"):
            torch.rand(7)
        nested += torch.rand(2).tolist()
    assert nested == plain
    with pytest.raises(ZeroDivisionError), tracker.fork("model-parallel-rng"):
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), outer)
    with pytest.raises(Exception, match="nowhere"), tracker.fork("nowhere"):
        pass
