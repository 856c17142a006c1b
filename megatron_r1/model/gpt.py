"""The policy network: Megatron's GPTModel, whose forward gives logits without labels and losses with them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_r1.parallel.vocab import log_probs_and_entropy


class PolicyModel(GPTModel):
    """GPTModel that can do without its multi-token-prediction layers.

    The stock model runs them in every forward and fails without labels. Here a forward with `labels` is the stock
    one (per-token losses, MTP included), and a forward without them is the trunk alone and returns logits: what
    sampling and the policy loss need. Losses ignore the entries that pad the vocabulary for tensor parallelism.
    """

    unpadded_vocab: int
    """Size of the vocabulary before padding."""

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """-log p of each label: labels [B, S], logits [S, B, V / TP] -> [B, S] float32."""
        log_probs, _ = log_probs_and_entropy(
            logits.transpose(0, 1), labels, vocab_size=self.unpadded_vocab, group=self.pg_collection.tp
        )
        return -log_probs

    def _postprocess(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("labels") is not None:
            return super()._postprocess(hidden_states, **kwargs)
        if not self.post_process:
            return hidden_states
        context = kwargs.get("inference_context")
        if context is not None and context.materialize_only_last_token_logits:
            hidden_states = hidden_states[-1:]
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits_SBV, _ = self.output_layer(
            hidden_states, weight=weight, runtime_gather_output=kwargs.get("runtime_gather_output")
        )
        return logits_SBV.transpose(0, 1).contiguous()
