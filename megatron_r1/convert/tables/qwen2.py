"""Qwen2 and Qwen2.5: Llama's table with biases of query, key and value."""

from __future__ import annotations

import dataclasses

from megatron_r1.convert.tables.blocks import QKV_BIAS
from megatron_r1.convert.tables.llama import LLAMA

QWEN2 = dataclasses.replace(LLAMA, name="qwen2", layer=(*LLAMA.layer, *QKV_BIAS))
