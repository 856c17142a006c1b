"""An architecture and a layout become Megatron's TransformerConfig.

The names on the left are Hugging Face's, on the right Megatron-Core's; facts about DeepSeek-V3 follow its technical
report (arXiv 2412.19437). Whatever Megatron would get silently wrong is refused (`model/megatron_traps.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig, ParallelConfig
from megatron_r1.model import kernels
from megatron_r1.model.megatron_fields import DTYPE_NAMES, check_pass_through
from megatron_r1.model.megatron_traps import check_traps
from megatron_r1.model.precision import bf16_parameters, transformer_engine_installed
from megatron_r1.model.presets import Architecture, has_experts


def transformer_config(
    arch: Architecture, model: ModelConfig, layout: ParallelConfig, *, on_cpu: bool
) -> TransformerConfig:
    """Megatron's configuration of this architecture under this layout.

    Raises UserError for an unknown `[model.megatron]` field, for a value that Megatron-Core 0.16.1 would turn into a
    silently wrong result, or for one that would have no effect.
    """
    family = _FAMILY.get(arch["model_type"], _grouped_query)(arch)
    fields = {**_common(arch), **family, **_parallel(model, layout), **_recompute(model)}
    if not on_cpu:
        fields.update(_kernels(arch))
    layers = arch.get("num_nextn_predict_layers") or 0
    if layers and model.mtp is not False:
        fields.update(mtp_num_layers=layers)
    cls = MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig
    check_pass_through(model.megatron, latent_attention=cls is MLATransformerConfig)
    installed = not on_cpu and transformer_engine_installed()
    check_traps(arch, model, layout, on_cpu=on_cpu, transformer_engine=installed)
    fields.update(resolve_dtypes(model.megatron, cls))
    if "attention_backend" in fields:
        fields["attention_backend"] = AttnBackend[fields["attention_backend"]]  # Megatron ignores a mere name
    try:
        return cls(**fields)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"Megatron-Core refuses this model and layout: {error}") from error


def resolve_dtypes(fields: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The fields with the dtype names of TOML ("bf16") as torch dtypes, where dataclass `cls` declares a dtype."""
    dtypes = {field.name for field in dataclasses.fields(cls) if "torch.dtype" in str(field.type)}
    return {
        key: getattr(torch, DTYPE_NAMES[value]) if key in dtypes and isinstance(value, str) else value
        for key, value in fields.items()
    }


def _common(arch: Architecture) -> dict[str, Any]:
    return dict(
        num_layers=arch["num_hidden_layers"],
        hidden_size=arch["hidden_size"],
        ffn_hidden_size=arch["intermediate_size"],
        num_attention_heads=arch["num_attention_heads"],
        normalization="RMSNorm",
        layernorm_epsilon=arch["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=arch.get("initializer_range", 0.02),
    )


def _grouped_query(arch: Architecture) -> dict[str, Any]:
    heads = arch["num_attention_heads"]
    return dict(
        num_query_groups=arch.get("num_key_value_heads", heads),
        kv_channels=arch.get("head_dim") or arch["hidden_size"] // heads,
        add_qkv_bias=arch["model_type"] == "qwen2",
        qk_layernorm=arch["model_type"] in ("qwen3", "qwen3_moe"),
    )


def _qwen3_moe(arch: Architecture) -> dict[str, Any]:
    """Experts in every layer, so that `moe_layer_freq` stays 1 and Megatron's checkpoints stack the layers."""
    return dict(
        **_grouped_query(arch),
        num_moe_experts=arch["num_experts"],
        moe_ffn_hidden_size=arch["moe_intermediate_size"],
        moe_router_topk=arch["num_experts_per_tok"],
        moe_router_score_function="softmax",
        # The softmax over the chosen experts alone is the softmax over all, made to add up to 1 over the chosen.
        moe_router_pre_softmax=not arch["norm_topk_prob"],
        **_experts(),
    )


def _deepseek_v3(arch: Architecture) -> dict[str, Any]:
    grouped = (arch.get("n_group") or 1) > 1
    dense = arch["first_k_dense_replace"]
    return dict(
        multi_latent_attention=True,
        q_lora_rank=arch["q_lora_rank"],
        kv_lora_rank=arch["kv_lora_rank"],
        qk_head_dim=arch["qk_nope_head_dim"],
        qk_pos_emb_head_dim=arch["qk_rope_head_dim"],
        v_head_dim=arch["v_head_dim"],
        kv_channels=arch["v_head_dim"],
        qk_layernorm=True,
        rotary_base=arch["rope_theta"],
        **_rope(arch),
        num_moe_experts=arch["n_routed_experts"],
        moe_layer_freq=[0] * dense + [1] * (arch["num_hidden_layers"] - dense),
        moe_ffn_hidden_size=arch["moe_intermediate_size"],
        moe_shared_expert_intermediate_size=arch["n_shared_experts"] * arch["moe_intermediate_size"],
        moe_router_topk=arch["num_experts_per_tok"],
        moe_router_score_function="sigmoid",
        moe_router_num_groups=arch["n_group"] if grouped else None,
        moe_router_group_topk=arch["topk_group"] if grouped else None,
        moe_router_topk_scaling_factor=arch["routed_scaling_factor"],
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=1e-3,
        **_experts(),
    )


def _experts() -> dict[str, Any]:
    return dict(
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_dtype="fp32",
        moe_grouped_gemm=False,
    )


_FAMILY = {"deepseek_v3": _deepseek_v3, "qwen3_moe": _qwen3_moe}


def _rope(arch: Architecture) -> dict[str, Any]:
    scaling = arch.get("rope_scaling")
    if not scaling:
        # Megatron multiplies the softmax scale by m(mscale_all_dim)^2 for any rope type; a factor of 1 makes m = 1.
        return dict(rope_type="rope", rotary_scaling_factor=1.0)
    return dict(
        rope_type="yarn",
        rotary_scaling_factor=float(scaling["factor"]),
        original_max_position_embeddings=scaling["original_max_position_embeddings"],
        beta_fast=scaling["beta_fast"],
        beta_slow=scaling["beta_slow"],
        mscale=scaling["mscale"],
        mscale_all_dim=scaling["mscale_all_dim"],
    )


def _parallel(model: ModelConfig, layout: ParallelConfig) -> dict[str, Any]:
    bf16 = bf16_parameters(model.precision)
    dtype = torch.bfloat16 if bf16 else torch.float32
    fields: dict[str, Any] = dict(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.etp,
        # Megatron refuses TP with experts in training unless sequences are sharded too, and MLA's replicated
        # down-projections get the right gradient only that way.
        sequence_parallel=layout.shards_sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        # Experts drawn from the default CPU generator would be identical on every expert-parallel rank.
        use_cpu_initialization=False,
        # Gradients are divided by a count of tokens over the whole batch, so that every layout agrees.
        calculate_per_token_loss=True,
        # With allgather every row has the same length (`train/micro_batches.py`), with the others lengths vary.
        variable_seq_lengths=layout.dispatcher != "allgather",
        moe_token_dispatcher_type=layout.dispatcher,
    )
    if model.precision == "fp8-blockwise":
        # Parameters stay bf16; Transformer Engine quantises inputs, weights and gradients at each product.
        fields.update(fp8="e4m3", fp8_recipe="blockwise")
    if layout.virtual_pipeline > 1:
        # With two stages, batched p2p swaps the interleaved schedule's messages and trains wrongly without an error.
        fields.update(
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            batch_p2p_comm=False,
            overlap_p2p_comm=True,
        )
    return fields


def _recompute(model: ModelConfig) -> dict[str, Any]:
    if model.recompute == "selective":
        return dict(recompute_granularity="selective", recompute_modules=list(model.recompute_modules))
    if model.recompute == "full":
        return dict(
            recompute_granularity="full",
            recompute_method=model.recompute_method,
            recompute_num_layers=model.recompute_layers or 1,
        )
    return {}


def _kernels(arch: Architecture) -> dict[str, Any]:
    """Fused kernels that exist on GPUs only (Transformer Engine's grouped GEMM among them)."""
    fused: dict[str, Any] = dict(
        bias_activation_fusion=True,
        masked_softmax_fusion=True,
        # Megatron's own column-parallel layer (the output head) takes this from Apex alone, and raises without it.
        gradient_accumulation_fusion=kernels.available(on_cpu=False).fused_wgrad,
    )
    if has_experts(arch):
        fused.update(moe_grouped_gemm=True, moe_permute_fusion=True)
    return fused
