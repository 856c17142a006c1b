"""What a precision asks for, known before any process starts: installed libraries, shapes, row lengths. No torch.

`pipeline/preflight.py` calls `check_precision` in the launching process, `train/` takes `row_multiple` for its batches.
The device itself is looked at by the ranks (`model/kernels.py`); the arithmetic of "fp8-emulated" is in `model/fp8.py`.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig, ParallelConfig, Precision

BLOCK = 128  # values of a row, or rows and columns of a weight, that share one scale (DeepSeek-V3, section 3.3.2)
# Read by Transformer Engine once, when it is first imported.
FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"


def bf16_parameters(precision: Precision) -> bool:
    """Whether parameters and activations are bf16 (master weights and reduced gradients are fp32 everywhere)."""
    return precision in ("bf16", "fp8-blockwise")


def row_multiple(precision: Precision) -> int:
    """Tokens that the rows of a micro-batch on one rank must be a multiple of (rows x tokens, after slicing).

    128 with fp8-blockwise: the product for the weight gradient scales tiles of 128 tokens, its kernels refuse counts
    that are no multiple of 16, and Transformer Engine gathers quantised shards only where they hold whole tiles. Under
    context parallelism, and under tensor parallelism with sequence parallelism, a rank's slice counts: multiply by
    both sizes. The emulation takes partial tiles as they come: 1.
    """
    return BLOCK if precision == "fp8-blockwise" else 1


def row_alignment(layout: ParallelConfig, multiple: int) -> int:
    """Tokens that the length of a whole row is rounded up to, before context-parallel ranks take their slices.

    Each context rank holds two chunks of every sequence (zig-zag), and tensor-parallel ranks share what it holds
    (sequence parallelism). multiple: what a rank's share must divide by, from `row_multiple`.
    """
    zigzag = 2 * layout.context if layout.context > 1 else 1
    return math.lcm(zigzag, layout.context * layout.tensor * multiple)


def transformer_engine_installed() -> bool:
    """Whether the package is there. Imports nothing."""
    return importlib.util.find_spec("transformer_engine") is not None


def set_environment(model: ModelConfig) -> None:
    """Tell Transformer Engine which scales to use. In each rank, before anything imports it (Megatron-Core does)."""
    if model.precision == "fp8-blockwise":
        os.environ[FP32_SCALES] = "1" if model.fp8_scales == "fp32" else "0"


def check_precision(model: ModelConfig, arch: Mapping[str, Any], layout: ParallelConfig) -> None:
    """Refuse fp8-blockwise where it cannot run; the other precisions run everywhere.

    Args:
        model: the `[model]` table.
        arch: the keys of a Hugging Face config.json.
        layout: the `[parallel]` table.

    Raises:
        UserError: Transformer Engine is not installed, or widths are not whole blocks (all of them are named).
    """
    if model.precision != "fp8-blockwise":
        return
    wrong = [
        f"{name} = {width}: the next multiple of {BLOCK} is {-(-width // BLOCK) * BLOCK}"
        for name, width in _widths(arch, layout)
        if width % BLOCK
    ]
    if wrong:
        raise UserError(
            "\n  ".join(
                [
                    f'model.precision = "fp8-blockwise" scales blocks of {BLOCK}, and these widths on a rank are not '
                    "whole blocks (change the architecture or the layout, or take precision = "
                    '"bf16"; "fp8-emulated" takes any width):',
                    *wrong,
                ]
            )
        )
    if not transformer_engine_installed():
        raise UserError(
            'model.precision = "fp8-blockwise" needs Transformer Engine, which is not installed: '
            "pip install 'megatron-r1[gpu]' (and a Hopper GPU). To measure its effect without a GPU take "
            'precision = "fp8-emulated", else "bf16"'
        )


def _widths(arch: Mapping[str, Any], layout: ParallelConfig) -> Iterator[tuple[str, int]]:
    """(what it is in config.json, width on a rank) of every linear layer's input and output.

    One is left out: the output of the key-value down-projection of latent attention, kv_lora_rank +
    qk_rope_head_dim = 576 in DeepSeek-V3 itself, whose last block is half full there as in its checkpoint.
    """
    tensor, expert = layout.tensor, layout.etp

    def split(name: str, width: int, ranks: int, key: str) -> tuple[str, int]:
        return (f"{name} / {key} ({width} / {ranks})", width // ranks) if ranks > 1 else (name, width)

    heads, hidden = arch["num_attention_heads"], arch["hidden_size"]
    yield "hidden_size", hidden
    if arch["model_type"] == "qwen3_moe":  # experts in every layer
        yield split("moe_intermediate_size", arch["moe_intermediate_size"], expert, "parallel.expert_tensor")
    else:
        yield split("intermediate_size", arch["intermediate_size"], tensor, "parallel.tensor")
    if arch["model_type"] == "deepseek_v3":
        if arch["q_lora_rank"] is not None:
            yield "q_lora_rank", arch["q_lora_rank"]
        yield "kv_lora_rank", arch["kv_lora_rank"]
        nope, rope, value = arch["qk_nope_head_dim"], arch["qk_rope_head_dim"], arch["v_head_dim"]
        for name, width in (
            ("num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)", nope + rope),
            ("num_attention_heads * (qk_nope_head_dim + v_head_dim)", nope + value),
            ("num_attention_heads * v_head_dim", value),
        ):
            yield split(name, heads * width, tensor, "parallel.tensor")
        moe = arch["moe_intermediate_size"]
        yield split("moe_intermediate_size", moe, expert, "parallel.expert_tensor")
        yield split(
            "n_shared_experts * moe_intermediate_size", arch["n_shared_experts"] * moe, tensor, "parallel.tensor"
        )
        return
    width = arch.get("head_dim") or hidden // heads
    groups = arch.get("num_key_value_heads", heads)
    yield split("num_attention_heads * head_dim", heads * width, tensor, "parallel.tensor")
    name = "(num_attention_heads + 2 * num_key_value_heads) * head_dim"
    yield split(name, (heads + 2 * groups) * width, tensor, "parallel.tensor")
