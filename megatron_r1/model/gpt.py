"""The policy network: Megatron's GPTModel, whose forward scores the tokens it is asked about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel

from megatron_r1.model.log_prob_head import token_log_probs

# Shapes: S positions of a row (this rank's, with context parallelism), B rows, H hidden size, M scored tokens.


# What the multi-token-prediction block takes of the forward's own arguments.
_PASSED_ON = (
    *("input_ids", "position_ids", "attention_mask", "inference_params", "packed_seq_params"),
    *("rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "sequence_len_offset"),
)


@dataclass(frozen=True, slots=True)
class TokenQuery:
    """Which next tokens a forward scores.

    `ahead` asks the multi-token-prediction layers, one entry a depth; empty: they are not run.
    """

    index_M: torch.Tensor  # int64 flat position b * S + s from which a token is predicted
    targets_M: torch.Tensor  # int64 ids of the tokens
    temperature: float = 1.0
    ahead: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()  # (index, targets) of each depth
    detach_ahead: bool = False  # the loss of the depths reaches only the multi-token-prediction layers


class PolicyModel(GPTModel):
    """GPTModel that returns log-probs of chosen tokens and never holds the logits of a whole sequence.

    A forward with a `query` returns, on the last pipeline stage, [2, M + sum of the depths' M] float32: log-probs and
    entropies of the query's tokens, then of each depth's. Without one it returns logits [B, S, V / TP], which
    sampling needs. The stock model runs its multi-token-prediction layers in every forward and fails without labels;
    this one runs them when the query asks for them.
    """

    unpadded_vocab: int
    """Size of the vocabulary before padding; losses ignore the entries beyond it."""

    _query: Any = None  # a TokenQuery; subclasses have their own

    def forward(self, *args: Any, query: Any = None, **kwargs: Any) -> torch.Tensor:
        """GPTModel.forward; `query` reaches the end of it."""
        self._query = query
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._query = None

    def _postprocess(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        if self._query is None:
            return self._logits(hidden_states, kwargs)
        query: TokenQuery = self._query
        scored = [self._score(hidden_states, query.index_M, query.targets_M, query)]
        if query.ahead:
            depths = self._ahead(hidden_states, query.detach_ahead, kwargs)
            for hidden_SBH, (index_M, targets_M) in zip(depths, query.ahead, strict=True):
                scored.append(self._score(hidden_SBH, index_M, targets_M, query, detach=query.detach_ahead))
        return torch.cat(scored, dim=1)

    def _logits(self, hidden_SBH: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        context = kwargs.get("inference_context")
        if context is not None and context.materialize_only_last_token_logits:
            hidden_SBH = hidden_SBH[-1:]
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits_SBV, _ = self.output_layer(
            hidden_SBH, weight=weight, runtime_gather_output=kwargs.get("runtime_gather_output")
        )
        return logits_SBV.transpose(0, 1).contiguous()

    def _ahead(self, hidden_SBH: torch.Tensor, detach: bool, kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Hidden states of each multi-token-prediction depth."""

        def embedding(**inputs: torch.Tensor) -> torch.Tensor:
            embedded: torch.Tensor = self.embedding(**inputs)
            return embedded.detach() if detach else embedded

        # A recomputed block passes gradients on only where one of its inputs asks for them.
        trunk = hidden_SBH.detach().requires_grad_() if detach else hidden_SBH
        both = self.mtp(
            hidden_states=trunk,
            embedding=embedding,
            **{name: kwargs[name] for name in _PASSED_ON},
            **(kwargs.get("extra_block_kwargs") or {}),
        )
        return torch.chunk(both, 1 + self.config.mtp_num_layers, dim=0)[1:]

    def _score(
        self,
        hidden_SBH: torch.Tensor,
        index_M: torch.Tensor,
        targets_M: torch.Tensor,
        query: TokenQuery,
        detach: bool = False,
    ) -> torch.Tensor:
        """[2, M] log-probs and entropies of the targets, each predicted from its position."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # Each rank's head knows only its slice of the vocabulary: backward sums the ranks' parts.
            hidden_SBH = tensor_parallel.gather_from_sequence_parallel_region(hidden_SBH, True, group=group)
        elif group.size() > 1:
            hidden_SBH = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_SBH, group=group)
        length, rows, _ = hidden_SBH.shape
        index = (index_M % length) * rows + index_M // length
        weight_VH = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        log_probs, entropy = token_log_probs(
            hidden_SBH.flatten(0, 1).index_select(0, index),
            weight_VH.detach() if detach else weight_VH,
            targets_M,
            vocab_size=self.unpadded_vocab,
            temperature=query.temperature,
            group=group if group.size() > 1 else None,
        )
        return torch.stack([log_probs, entropy])
