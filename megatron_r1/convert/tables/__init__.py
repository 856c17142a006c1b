"""The conversion tables: one declarative family a `model_type`, read in both directions."""

from __future__ import annotations

from megatron_r1.convert.tables.deepseek_v3 import DEEPSEEK_V3
from megatron_r1.convert.tables.llama import LLAMA
from megatron_r1.convert.tables.qwen2 import QWEN2
from megatron_r1.convert.tables.qwen3 import QWEN3
from megatron_r1.convert.tables.qwen3_moe import QWEN3_MOE
from megatron_r1.convert.tables.rule import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (DEEPSEEK_V3, LLAMA, QWEN2, QWEN3, QWEN3_MOE)}
