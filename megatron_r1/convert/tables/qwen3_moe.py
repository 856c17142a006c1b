"""Qwen3-MoE: Qwen3's attention, and experts in every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_r1.convert.tables.blocks import ROUTER, gated_mlp, grouped_query_dims
from megatron_r1.convert.tables.qwen3 import QWEN3


def _dims(arch: Mapping[str, Any]) -> dict[str, int]:
    return {
        **grouped_query_dims(arch),
        "dense": 0,
        "experts": arch["num_experts"],
        "expert_ffn": arch["moe_intermediate_size"],
    }


QWEN3_MOE = dataclasses.replace(
    QWEN3, name="qwen3_moe", dims=_dims, dense=(), moe=(ROUTER,), expert=gated_mlp("", "expert_ffn")
)
