"""This replica's share of a global batch, cut so that the layout can run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.config.stages import TrainStage
from megatron_r1.data.batching import MicroBatch, make_micro_batches
from megatron_r1.model.precision import row_alignment, row_multiple
from megatron_r1.parallel.world import World
from megatron_r1.train.context import RunContext
from megatron_r1.types import Sample


@dataclass(frozen=True, slots=True)
class Batcher:
    """Samples -> this rank's micro-batches, on its device. Every replica gets equally many.

    The lengths of rows suit the layout: each context rank holds two chunks of every sequence, and tensor-parallel
    ranks share what it holds (sequence parallelism). Under virtual pipelining the number of micro-batches is a
    multiple of the stages, as Megatron's interleaved schedule demands.
    """

    world: World
    max_tokens: int  # of a micro-batch
    pad_id: int
    packed: bool = True  # several sequences share a row
    token_multiple: int = 1  # what the number of tokens that a rank holds of a row must divide by (FP8: 128)
    together: int = 1  # each so many samples in a row share a micro-batch (2: pairs)

    @classmethod
    def of(cls, stage: TrainStage, context: RunContext, together: int = 1) -> Batcher:
        """As the stage's recipe says."""
        multiple = row_multiple(context.model.precision)
        pad_id = context.tokenizer.pad_id
        return cls(context.world, stage.micro_batch_tokens, pad_id, stage.packing, multiple, together)

    def __call__(self, samples: Sequence[Sample], mtp_depths: int = 0) -> list[MicroBatch]:
        """The micro-batches; mtp_depths: how many tokens ahead multi-token prediction looks beyond the next one."""
        layout, world = self.world.layout, self.world
        zigzag = 2 * layout.context if layout.context > 1 else 1
        shards = make_micro_batches(
            samples,
            self.max_tokens,
            self.pad_id,
            packed=self.packed,
            multiple_of=row_alignment(layout, self.token_multiple),
            sequence_multiple_of=zigzag,
            fixed_length=layout.dispatcher == "allgather",
            shards=world.data_size,
            count_multiple_of=layout.pipeline if layout.virtual_pipeline > 1 else 1,
            mtp_depths=mtp_depths,
            together=self.together,
            only_shard=world.data_rank,
        )
        mine = shards[world.data_rank]
        if layout.context > 1:
            mine = [batch.context_slice(layout.context, world.context_rank) for batch in mine]
        return [batch.to(world.device) for batch in mine]
