"""Layer specs: Transformer Engine's on a GPU that has it, else Megatron's local ones with three modules of ours.

The three modules plug into Megatron's ModuleSpec, its supported extension point:

* `TorchRMSNorm`: the stock torch norm refuses sequence parallelism; this one marks its weight instead.
* `TorchCoreAttention`: the stock core attention has neither distinct key and value widths (MLA) nor packed
  sequences nor context parallelism; this one has them, on torch's scaled_dot_product_attention.
* `ReplicatedMLASelfAttention`: with column-parallel down-projections the gradient of the shared rope key is never
  summed over tensor-parallel ranks (Megatron-LM issue 1699); replicated ones, as in the TE spec, are right.
"""

from __future__ import annotations

import importlib.util
import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import gpt_layer_specs as stock
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.parallel.context import zigzag_positions

# Shapes: S query tokens, K key tokens, B rows, N heads, D head width.


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight knows whether its gradient must be summed over sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class TorchCoreAttention(MegatronModule):
    """Causal attention: grouped queries, key width != value width, packed (thd) rows, context parallelism, decode.

    Context parallelism gathers keys and values over the group (zig-zag order) and masks by position. With packed
    rows each sequence attends to itself only. When there are fewer queries than keys, the queries are the last ones
    (decoding with a KV cache).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.context_group: Any = getattr(pg_collection, "cp", None)
        self.context_size = self.context_group.size() if self.context_group is not None else 1
        self.scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_KBND: torch.Tensor,
        value_KBND: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Returns [S, B, N * D_value]; with packed_seq_params inputs are [T, N, D] and the output [T, N * D_value]."""
        if packed_seq_params is not None:
            return self._packed(query_SBND, key_KBND, value_KBND, packed_seq_params.cu_seqlens_q.tolist())
        if self.context_size > 1:
            return self._context_parallel(query_SBND, key_KBND, value_KBND)
        queries, keys = query_SBND.shape[0], key_KBND.shape[0]
        mask = None
        if 1 < queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query_SBND.device).tril(keys - queries)
        return self._attend(query_SBND, key_KBND, value_KBND, causal=queries == keys, mask=mask)

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int]) -> torch.Tensor:
        if self.context_size > 1:
            raise ValueError("packed sequences together with context parallelism need Transformer Engine")
        parts = [
            self._attend(query[a:b, None], key[a:b, None], value[a:b, None], causal=True)[:, 0]
            for a, b in pairwise(bounds)
        ]
        return torch.cat(parts)

    def _context_parallel(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (
            tensor_parallel.gather_from_sequence_parallel_region(x.contiguous(), True, group=self.context_group)
            for x in (key, value)
        )
        size, rank = self.context_size, self.context_group.rank()
        held = torch.cat([zigzag_positions(key.shape[0], size, r) for r in range(size)]).to(key.device)
        mine = zigzag_positions(key.shape[0], size, rank).to(key.device)
        return self._attend(query, key, value, mask=held[None, :] <= mine[:, None])

    def _attend(
        self,
        query_SBND: torch.Tensor,
        key_KBND: torch.Tensor,
        value_KBND: torch.Tensor,
        causal: bool = False,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_KBND, value_KBND))
        grouped = q.shape[1] != k.shape[1]
        out_BNSD = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=grouped
        )
        return out_BNSD.permute(2, 0, 1, 3).reshape(q.shape[2], q.shape[0], -1)


class ReplicatedLinear(torch.nn.Linear):
    """A weight replicated over tensor-parallel ranks, applied to the sequence shard of each."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=config.params_dtype)
        with tensor_parallel.get_cuda_rng_tracker().fork("data-parallel-rng"):  # equal on all tensor-parallel ranks
            config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """(output, bias) as Megatron's linear layers return it."""
        return super().forward(input), None


class ReplicatedMLASelfAttention(MLASelfAttention):
    """Multi-latent attention whose two down-projections are replicated over tensor-parallel ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config.hidden_size, config.q_lora_rank, config)
        width = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = ReplicatedLinear(config.hidden_size, width, config)


def transformer_engine_available() -> bool:
    """Whether Transformer Engine can be used: it is installed and there is a GPU."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def decoder_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Spec of the decoder layers that this pipeline stage (and virtual stage) builds."""
    if transformer_engine_available():
        return stock.get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    return _with_our_modules(
        stock.get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
        )
    )


def mtp_spec(config: TransformerConfig, vp_stage: int | None) -> Any:
    """Spec of the multi-token-prediction block, or None where this stage has none.

    Its layer is the decoder's last one. It is taken from the full list of layers, because a stage's own list may be
    empty.
    """
    if not config.mtp_num_layers:
        return None
    if transformer_engine_available():
        layers = stock.get_gpt_decoder_layer_specs(config, use_transformer_engine=True)
        last = TransformerBlockSubmodules(layer_specs=layers[-1:], layer_norm=None)
        return stock.get_gpt_mtp_block_spec(config, last, use_transformer_engine=True, vp_stage=vp_stage)
    layers = stock.get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization="RMSNorm")
    last = _with_our_modules(TransformerBlockSubmodules(layer_specs=layers[-1:], layer_norm=TorchRMSNorm))
    spec = stock.get_gpt_mtp_block_spec(config, last, use_transformer_engine=False, vp_stage=vp_stage)
    for layer in spec.layer_specs if spec is not None else []:
        layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = TorchRMSNorm
    return spec


def _with_our_modules(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = TorchRMSNorm
        attention: ModuleSpec = parts.self_attention
        if attention.module is MLASelfAttention:
            attention.module = ReplicatedMLASelfAttention
        attention.submodules.core_attention = TorchCoreAttention
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention.submodules, name, None) not in (None, IdentityOp):
                setattr(attention.submodules, name, TorchRMSNorm)
    block.layer_norm = TorchRMSNorm
    return block
