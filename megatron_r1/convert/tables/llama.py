"""Llama."""

from __future__ import annotations

from megatron_r1.convert.tables.blocks import (
    GROUPED_QUERY,
    NORMS,
    OLD_BUFFERS,
    OUTER,
    gated_mlp,
    grouped_query_dims,
)
from megatron_r1.convert.tables.rule import Family

LLAMA = Family(
    name="llama",
    dims=grouped_query_dims,
    outer=OUTER,
    layer=(*NORMS, *GROUPED_QUERY),
    dense=gated_mlp("mlp.", "ffn"),
    dropped=OLD_BUFFERS,
)
