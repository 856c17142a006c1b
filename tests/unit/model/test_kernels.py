"""Which fused kernels are taken for real: packages made up on a temporary path, looked at from a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig
from megatron_r1.model import kernels

ROOT = Path(__file__).resolve().parents[3]
FUSED_ADAM = "class FusedAdam:\n    pass\n"
WGRAD = "def wgrad_gemm_accum_fp32(*_): ...\ndef wgrad_gemm_accum_fp16(*_): ...\n"
REAL = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "", "apex/optimizers/fused_adam.py": FUSED_ADAM}
EXTENSIONS = {"amp_C.py": "", "fused_weight_gradient_mlp_cuda.py": WGRAD}
# The one on PyPI fails to import on a modern Python, and would say so loudly if anything ran it.
FOREIGN = {"apex/__init__.py": "print('the foreign apex ran')\nraise RuntimeError('not for this Python')\n"}
LOOK = """
from megatron_r1.model import kernels
hidden = kernels.hide_foreign_apex()
found = kernels.available(on_cpu=False)
print(hidden, found.apex_adam, found.fused_wgrad, "apex" in __import__("sys").modules)
"""


def python(code: str, folder: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run code with these files first on the module path."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "False False False False"),
        ({**REAL, **EXTENSIONS}, "False True True False"),
        (REAL, "False False False False"),  # built without its extensions: nothing is fused
        ({**REAL, "amp_C.py": ""}, "False True False False"),
        ({**REAL, "fused_weight_gradient_mlp_cuda.py": "raise ImportError('built for another torch')"}, "F F F False"),
        ({**REAL, "fused_weight_gradient_mlp_cuda.py": "def wgrad_gemm_accum_fp32(*_): ...\n"}, "F F F False"),
        (EXTENSIONS, "False False False False"),  # names alone, without Apex, are nobody's
        ({**FOREIGN, **EXTENSIONS}, "True False False True"),  # True at the end: marked as not importable
        ({"apex.py": "raise RuntimeError"}, "True False False True"),
        ({**FOREIGN, "apex/optimizers/fused_adam.py": "FusedAdam = None\n"}, "True False False True"),
    ],
    ids=["none", "real", "no extensions", "no wgrad", "broken", "half", "no apex", "foreign", "module", "no class"],
)
def test_apex_is_known_by_its_symbols(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    done = python(LOOK, tmp_path, files)
    assert done.stdout.split() == expected.replace("F ", "False ").split(), done.stderr
    foreign = expected.startswith("True")
    assert ("`apex` is not NVIDIA's" in done.stderr) == foreign and "Traceback" not in done.stderr


@pytest.mark.slow  # imports Megatron-Core in a process of its own
def test_a_foreign_apex_cannot_break_megatron(tmp_path: Path) -> None:
    """Unhidden it does: Megatron-Core catches ImportError only. Hidden, torch's Adam is used."""
    code = """
import sys
try:
    from megatron.core import optimizer
except RuntimeError as error:
    print("broken:", error)
for name in [name for name in sys.modules if name.startswith("megatron")]:
    del sys.modules[name]
from megatron_r1.model import kernels
kernels.hide_foreign_apex()
from megatron.core import optimizer
print(optimizer.Adam.__module__)
"""
    done = python(code, tmp_path, FOREIGN)
    assert done.stdout.splitlines() == [
        "the foreign apex ran",
        "broken: not for this Python",
        "torch.optim.adamw",
    ], done.stderr


def test_ranks_start_with_it_before_megatron_is_loaded() -> None:
    code = """
import sys
from types import SimpleNamespace
from megatron_r1.model import kernels
from megatron_r1.pipeline import worker
kernels.start = lambda model: print(model, {"megatron.core", "transformer_engine"} & set(sys.modules))
sys.modules["torch"] = SimpleNamespace(set_num_threads=print)
worker.set_up_process(SimpleNamespace(model="the model", threads=3))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["the model set()", "3"], done.stderr


def test_nothing_is_looked_for_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "apex_folder", lambda: pytest.fail("looked"))
    found = kernels.available(on_cpu=True)
    assert found == kernels.Kernels(transformer_engine=False, apex_adam=False, fused_wgrad=False)
    assert found.describe() == "layers torch, Adam torch, weight-gradient accumulation separate"


def test_the_line_of_the_log() -> None:
    both = kernels.Kernels(transformer_engine=True, apex_adam=True, fused_wgrad=True)
    assert both.describe() == (
        "layers Transformer Engine, Adam Transformer Engine, weight-gradient accumulation fused (Apex)"
    )
    assert kernels.Kernels(False, True, False).describe().startswith("layers torch, Adam Apex, ")


def fp8(scales: str = "fp32") -> ModelConfig:
    return ModelConfig.model_validate({"preset": "deepseek-v3", "precision": "fp8-blockwise", "fp8_scales": scales})


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine whose GPU and Transformer Engine say what the test sets."""
    import torch

    told = SimpleNamespace(gpu=True, capability=(9, 0), works=(True, ""), fp32_scales=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: told.gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: told.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    recipe: Any = SimpleNamespace(Float8BlockScaling=lambda: SimpleNamespace(use_f32_scales=told.fp32_scales))
    manager = SimpleNamespace(is_fp8_block_scaling_available=lambda: told.works)
    for name in ("transformer_engine", "transformer_engine.common", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipe)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.fp8", SimpleNamespace(FP8GlobalStateManager=manager))
    return told


def test_a_hopper_gpu_runs_fp8(device: SimpleNamespace) -> None:
    kernels.require_fp8(fp8())
    device.fp32_scales = False
    kernels.require_fp8(fp8("power-of-2"))
    device.capability = (10, 0)
    kernels.require_fp8(fp8("power-of-2"))


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"gpu": False}, ["needs a Hopper GPU", "has no GPU", '"bf16"', '"fp8-emulated"']),
        ({"capability": (8, 9)}, ["compute capability 9.0", "Some GPU has 8.9"]),
        ({"capability": (10, 0)}, ['fp8_scales = "fp32"', "Blackwell", 'set fp8_scales = "power-of-2"']),
        ({"works": (False, "needs CUDA >= 12.9.")}, ["Transformer Engine refuses this device: needs CUDA >= 12.9."]),
        ({"fp32_scales": False}, ['fp8_scales = "fp32"', "NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1: fp32"]),
    ],
)
def test_other_devices_are_refused(device: SimpleNamespace, told: dict[str, Any], words: list[str]) -> None:
    vars(device).update(told)
    with pytest.raises(UserError) as caught:
        kernels.require_fp8(fp8())
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8-emulated"])
def test_other_precisions_need_no_device(precision: str) -> None:
    kernels.require_fp8(ModelConfig.model_validate({"preset": "tiny-moe", "precision": precision}))
