"""Layer specs: Transformer Engine's on a GPU that has it, else Megatron's local ones with three modules of ours.

The three modules plug into Megatron's ModuleSpec, its supported extension point:

* `TorchRMSNorm`: the stock torch norm refuses sequence parallelism; this one marks its weight instead.
* `TorchCoreAttention` (`model/attention.py`): the stock core attention has neither distinct key and value widths
  (MLA) nor packed sequences nor context parallelism; this one has them.
* `ReplicatedMLASelfAttention`: with column-parallel down-projections the gradient of the shared rope key is never
  summed over tensor-parallel ranks (Megatron-LM issue 1699); replicated ones, as in the TE spec, are right.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import gpt_layer_specs as stock
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.model.attention import TorchCoreAttention


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight knows whether its gradient must be summed over sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


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


class PackedMTPLayer(MultiTokenPredictionLayer):
    """A multi-token-prediction layer that can be recomputed with packed rows.

    Megatron-Core 0.16.1 hands the rows' bounds to the checkpoint as if they were a tensor to save, and fails.
    """

    def _checkpointed_forward(self, forward_func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        packed = kwargs.pop("packed_seq_params", None)
        names = list(kwargs)

        def forward(*values: Any) -> Any:
            return forward_func(**dict(zip(names, values, strict=True)), packed_seq_params=packed)

        return super()._checkpointed_forward(forward, *args, *kwargs.values())


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
        spec = stock.get_gpt_mtp_block_spec(config, last, use_transformer_engine=True, vp_stage=vp_stage)
    else:
        layers = stock.get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization="RMSNorm")
        last = _with_our_modules(TransformerBlockSubmodules(layer_specs=layers[-1:], layer_norm=TorchRMSNorm))
        spec = stock.get_gpt_mtp_block_spec(config, last, use_transformer_engine=False, vp_stage=vp_stage)
        for layer in spec.layer_specs if spec is not None else []:
            layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = TorchRMSNorm
    for layer in spec.layer_specs if spec is not None else []:
        layer.module = PackedMTPLayer
    return spec


def _with_our_modules(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    for layer in block.layer_specs:
        parts = layer.submodules
        if parts.mlp.module is MoELayer:
            # Megatron's local spec saves this norm as a dense layer's; Transformer Engine's, under its own name.
            parts.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
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
