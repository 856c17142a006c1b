"""Fills a running model from any checkpoint: a Hugging Face folder, torch_dist under either layer spec, legacy.

Each rank reads the rows and columns that it holds, straight into its parameters; nothing is gathered and no file is
written. What a rank holds is what Megatron says in its sharded state: key, offset and shape of every local tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_r1.config.errors import UserError
from megatron_r1.convert.execute import BAND, Maker
from megatron_r1.convert.formats.names import parse
from megatron_r1.convert.plan import HfSource, MegatronSource, Target, check_coverage
from megatron_r1.convert.storage import ITEMSIZE, TORCH_NAMES

_DTYPES = {getattr(torch, name): key for key, name in TORCH_NAMES.items()}


class Sharded(Protocol):
    """A chunk of a Megatron model."""

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Its local tensors with their places in the whole."""
        ...


@torch.no_grad()
def load_into(models: Sequence[Sharded], source: HfSource | MegatronSource, metadata: Mapping[str, Any]) -> list[str]:
    """Fill this rank's parameters and buffers; returns keys of the models that no language model's checkpoint has.

    metadata: Megatron's, for `sharded_state_dict`. Rows behind the vocabulary become 0. Not collective.
    """
    maker, left = Maker(), []
    try:
        for model in models:
            state = model.sharded_state_dict(metadata=dict(metadata))
            apply_factories(state)  # the halves of gated layers become tensors, which share the parameters' memory
            for leaf in nested_values(state):
                if isinstance(leaf, ShardedTensor) and not _fill(leaf, source, maker):
                    left.append(leaf.key)
    finally:
        maker.close()
    return left


def _fill(leaf: ShardedTensor, source: HfSource | MegatronSource, maker: Maker) -> bool:
    parsed = parse(leaf.key)
    axes = leaf.prepend_axis_num
    if parsed.axes > axes:
        raise UserError(f"{leaf.key} has {axes} stacked axes where its name says {parsed.axes}")
    entry = source.table.entries.get(parsed.canonical(leaf.global_offset[:axes]))
    if entry is None:
        return False
    data, offset = leaf.data.detach(), leaf.global_offset[axes:]
    matrix = data.view(data.shape[0], -1)
    first = offset[0] + (parsed.half or 0) * entry.rows[0]
    rows = range(first, max(first, min(first + data.shape[0], entry.shape[0])))  # the vocabulary may be padded
    if len(rows) < len(data) and not entry.rule.vocabulary:
        raise UserError(
            f"{leaf.key}: the model has rows {first} to {first + len(data)} where the architecture has {entry.shape[0]}"
        )
    cols = range(offset[1], offset[1] + data.shape[1]) if data.dim() > 1 else range(1)
    target = Target(leaf.key, _DTYPES[data.dtype], (len(rows), len(cols)), source.megatron_box(entry, rows, cols))
    check_coverage(target)
    for begin, end in _bands(len(rows), len(cols) * ITEMSIZE[target.dtype]):
        maker.rows(target, begin, end, target.dtype, into=matrix[begin:end])
    matrix[len(rows) :] = 0
    return True


def _bands(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, BAND // max(1, row_bytes))
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)
