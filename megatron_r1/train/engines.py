"""Which rollout engine samples for a stage."""

from __future__ import annotations

from megatron_r1.rollout.engine import RolloutEngine
from megatron_r1.rollout.megatron import MegatronEngine
from megatron_r1.train.context import RunContext
from megatron_r1.train.frozen import FrozenModel


def build_engine(model: FrozenModel, context: RunContext, *, record_routing: bool = False) -> RolloutEngine:
    """An engine that samples from the model's weights; record_routing: with the experts that each token went to."""
    return MegatronEngine(
        model.chunks,
        context.world,
        context.tokenizer,
        model.arch["vocab_size"],
        model.arch["max_position_embeddings"],
        recorder=model.taps if record_routing else None,
    )
