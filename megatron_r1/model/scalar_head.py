"""A reward model: the policy's trunk with one number a sequence where the policy has its output layer.

Built by `model/build.py` for the `reward_model` stage. Weights of a language model load into it; its head is then new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.model.gpt import PolicyModel

# Shapes: S positions of a row (this rank's, with context parallelism; divided again by sequence parallelism), B rows,
# H hidden size, M sequences that are scored.

HEAD = "scalar_head.weight"
"""Its name in a checkpoint, which tells a reward model's from a language model's."""


@dataclass(frozen=True, slots=True)
class ValueQuery:
    """Which sequences a forward scores."""

    index_M: torch.Tensor  # int64 flat position b * S + s of a sequence's last token


class ScalarHead(torch.nn.Module):
    """value = w . hidden, without bias (pairs see differences only), in float32 whatever the trunk's precision.

    w is [1, H] like `score.weight` of Hugging Face's sequence classifiers, and starts at 0: every value is 0 and the
    pairwise loss log 2 under any layout, and no random direction has to be unlearned. The first step moves w alone.
    """

    def __init__(self, config: TransformerConfig, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        # A sequence-parallel rank scores the tokens that it holds, so Megatron has to add up the ranks' gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.sequence_parallel, self.group = config.sequence_parallel, group

    def forward(self, hidden_SBH: torch.Tensor, index_M: torch.Tensor) -> torch.Tensor:
        """[M] float32, equal on all tensor-parallel ranks. Collective under sequence parallelism.

        index_M: positions of the row that the tensor-parallel ranks share.
        """
        length, rows, _ = hidden_SBH.shape
        shards = self.group.size() if self.sequence_parallel else 1
        row_M, position_M = index_M // (length * shards), index_M % (length * shards)
        local_M = position_M - (self.group.rank() * length if shards > 1 else 0)
        here_M = (local_M >= 0) & (local_M < length)
        picked_MH = hidden_SBH.flatten(0, 1).index_select(0, torch.where(here_M, local_M * rows + row_M, 0))
        values_M = (picked_MH.float() @ self.weight.float()[0]) * here_M
        if shards == 1:
            return values_M
        # Sums the values; backward hands each rank the gradient as it is. M numbers travel, not the hidden states.
        return tensor_parallel.reduce_from_tensor_model_parallel_region(values_M, group=self.group)


class RewardModel(PolicyModel):
    """A forward with a `ValueQuery` returns [M] float32 on the last pipeline stage, hidden states on the others.

    It has no output layer: nothing would train it, and tied to the embedding it would have to follow that across
    pipeline stages. So embeddings are never tied, and checkpoints hold no output layer.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("share_embeddings_and_output_weights") or kwargs.get("mtp_block_spec") is not None:
            raise ValueError("a reward model has no output layer to tie, and no multi-token prediction")
        super().__init__(config, *args, **kwargs)
        if self.post_process:
            self.output_layer = torch.nn.Identity()  # Megatron's offloading asks for its parameters
            self.scalar_head = ScalarHead(config, self.pg_collection.tp)

    def _postprocess(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        if not isinstance(self._query, ValueQuery):
            raise ValueError("a reward model scores sequences: its forward needs a ValueQuery")
        values_M: torch.Tensor = self.scalar_head(hidden_states, self._query.index_M)
        return values_M

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What the submodules say: all that GPTModel adds is about the output layer and multi-token prediction."""
        return super(LanguageModule, self).sharded_state_dict(*args, **kwargs)
