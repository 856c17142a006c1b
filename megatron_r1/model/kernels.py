"""Which fused kernels a rank has: Transformer Engine's and those of NVIDIA's Apex, told by their symbols.

The package called `apex` on PyPI is another project. Megatron-Core imports whatever answers to that name, so `start`
hides a foreign one before Megatron is loaded; `model/build.py` asks for what is there and logs it. Nothing here
imports a GPU library except inside the function that needs it.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig
from megatron_r1.model.precision import set_environment, transformer_engine_installed

logger = logging.getLogger(__name__)

WGRAD_SYMBOLS = ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16")
HOPPER, BLACKWELL = (9, 0), (10, 0)  # compute capabilities


@dataclass(frozen=True, slots=True)
class Kernels:
    """Fused kernels that this rank uses; all False on a CPU."""

    transformer_engine: bool
    apex_adam: bool  # apex.optimizers.FusedAdam; Megatron prefers Transformer Engine's
    fused_wgrad: bool  # Apex's weight-gradient product that adds into the fp32 gradient buffer

    def describe(self) -> str:
        """The line for the log."""
        adam = "Transformer Engine" if self.transformer_engine else "Apex" if self.apex_adam else "torch"
        layers = "Transformer Engine" if self.transformer_engine else "torch"
        wgrad = "fused (Apex)" if self.fused_wgrad else "separate"
        return f"layers {layers}, Adam {adam}, weight-gradient accumulation {wgrad}"


def start(model: ModelConfig) -> None:
    """What must happen in a rank before Megatron-Core, and with it Transformer Engine, is first imported."""
    set_environment(model)
    hide_foreign_apex()


def hide_foreign_apex() -> bool:
    """Make `import apex` fail, as if nothing were installed, where it is not NVIDIA's. Returns whether it did.

    Megatron-Core imports `apex` in a dozen places and catches ImportError only: a package of that name that fails in
    another way would end the run, and one that loads would be taken for NVIDIA's.
    """
    if "apex" in sys.modules or importlib.util.find_spec("apex") is None or apex_folder() is not None:
        return False
    logger.warning(
        "the installed package `apex` is not NVIDIA's (it has no optimizers/fused_adam.py) and is hidden from this "
        "process; `pip uninstall apex`, and install NVIDIA's from https://github.com/NVIDIA/apex for fused kernels"
    )
    sys.modules["apex"] = None  # type: ignore[assignment]  # Python's own mark for "not importable"
    return True


def apex_folder() -> Path | None:
    """Where NVIDIA's Apex is installed, known by its FusedAdam; None without it. Imports nothing of it.

    Only the name `apex` itself is looked up: finding "apex.optimizers" would already run the package.
    """
    spec = importlib.util.find_spec("apex")
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        source = Path(root) / "optimizers" / "fused_adam.py"
        if source.is_file() and re.search(r"^class FusedAdam\b", source.read_text(encoding="utf-8"), re.MULTILINE):
            return Path(root)
    return None


def available(*, on_cpu: bool) -> Kernels:
    """The fused kernels that exist on this rank. On a CPU nothing is looked for, let alone imported."""
    if on_cpu:
        return Kernels(transformer_engine=False, apex_adam=False, fused_wgrad=False)
    apex = apex_folder() is not None
    return Kernels(
        transformer_engine=transformer_engine_installed(),
        apex_adam=apex and importlib.util.find_spec("amp_C") is not None,
        fused_wgrad=apex and _has_fused_wgrad(),
    )


def _has_fused_wgrad() -> bool:
    """Apex is often built without its extensions, and an extension built for another torch does not load."""
    try:
        import fused_weight_gradient_mlp_cuda as extension  # type: ignore[import-not-found]
    except ImportError:
        return False
    return all(hasattr(extension, symbol) for symbol in WGRAD_SYMBOLS)


def require_fp8(model: ModelConfig) -> None:
    """Whether this rank's device runs fp8-blockwise with the scales asked for; returns for every other precision.

    Raises:
        UserError: no GPU, one older than Hopper, one that has not the scales asked for, a CUDA that Transformer Engine
            finds too old, or scales that cannot be had any more because it was imported earlier in this process.
    """
    if model.precision != "fp8-blockwise":
        return
    import torch

    said = 'model.precision = "fp8-blockwise" needs a Hopper GPU (compute capability 9.0 or higher)'
    cure = 'take precision = "bf16", or "fp8-emulated" to measure what FP8 does to the numbers'
    if not torch.cuda.is_available():
        raise UserError(f"{said}, but this rank has no GPU; {cure}")
    capability = torch.cuda.get_device_capability()
    if capability < HOPPER:
        name = torch.cuda.get_device_name()
        raise UserError(f"{said}, but this rank's {name} has {capability[0]}.{capability[1]}; {cure}")
    if capability >= BLACKWELL and model.fp8_scales == "fp32":
        raise UserError(
            'model.fp8_scales = "fp32": this rank\'s GPU is a Blackwell or newer, whose products know only powers of '
            'two; set fp8_scales = "power-of-2"'
        )
    from transformer_engine.common.recipe import Float8BlockScaling
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    works, reason = FP8GlobalStateManager.is_fp8_block_scaling_available()
    if not works:
        raise UserError(f'model.precision = "fp8-blockwise": Transformer Engine refuses this device: {reason}; {cure}')
    if Float8BlockScaling().use_f32_scales != (model.fp8_scales == "fp32"):
        raise UserError(
            f'model.fp8_scales = "{model.fp8_scales}": Transformer Engine was imported with the other scales; it reads '
            "NVTE_FP8_BLOCK_SCALING_FP32_SCALES once. Set that variable (1: fp32, 0: power-of-2) before the ranks start"
        )
