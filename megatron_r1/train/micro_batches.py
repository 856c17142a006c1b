"""This replica's share of a global batch, cut so that the layout can run it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.data.batching import MicroBatch, make_micro_batches
from megatron_r1.parallel.world import World
from megatron_r1.types import Sample


def own_micro_batches(samples: Sequence[Sample], world: World, *, max_tokens: int, pad_id: int) -> list[MicroBatch]:
    """The micro-batches of this rank's replica, on its device.

    Every replica gets equally many. Padded lengths divide by the tensor-parallel size (sequence parallelism shards
    them); under virtual pipelining the number of micro-batches is a multiple of the stages, as Megatron's interleaved
    schedule demands.
    """
    layout = world.layout
    shards = make_micro_batches(
        samples,
        max_tokens=max_tokens,
        pad_id=pad_id,
        multiple_of=layout.tensor,
        shards=world.data_size,
        count_multiple_of=layout.pipeline if layout.virtual_pipeline > 1 else 1,
    )
    return [batch.to(world.device) for batch in shards[world.data_rank]]
