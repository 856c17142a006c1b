"""Qwen3: Llama's table with norms of query and key."""

from __future__ import annotations

import dataclasses

from megatron_r1.convert.tables.blocks import QK_NORMS
from megatron_r1.convert.tables.llama import LLAMA

QWEN3 = dataclasses.replace(LLAMA, name="qwen3", layer=(*LLAMA.layer, *QK_NORMS))
