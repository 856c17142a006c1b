"""DeepSeek-V3 (also R1, Moonlight): latent attention, routed and shared experts, multi-token prediction.

The prediction layer's file repeats the embedding and the output head, which Megatron shares with the decoder. Its
`eh_proj` takes [embedding; hidden] in both formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1.convert.tables.blocks import NORMS, OLD_BUFFERS, OUTER, ROUTER, common_dims, gated_mlp
from megatron_r1.convert.tables.rule import ExtraState, Family, Rule, Split


def _latent(megatron: str, hf: str, rows: str, width: str, split: Split = "column", when: str | None = None) -> Rule:
    # Replicated down-projections are plain linear layers without extra state in the local spec.
    state: ExtraState = "te" if split == "none" else "both"
    names = f"self_attention.{megatron}.weight", (f"self_attn.{hf}.weight",)
    return Rule(*names, (rows,), width, split=split, fp8=True, when=when, extra_state=state)


_ATTENTION = (
    _latent("linear_q_proj", "q_proj", "q", "hidden", when="plain_query"),
    _latent("linear_q_down_proj", "q_a_proj", "q_rank", "hidden", "none", when="latent_query"),
    Rule("self_attention.q_layernorm.weight", ("self_attn.q_a_layernorm.weight",), ("q_rank",), when="latent_query"),
    _latent("linear_q_up_proj", "q_b_proj", "q", "q_rank", when="latent_query"),
    _latent("linear_kv_down_proj", "kv_a_proj_with_mqa", "kv_rank_and_rope", "hidden", "none"),
    Rule("self_attention.kv_layernorm.weight", ("self_attn.kv_a_layernorm.weight",), ("kv_rank",)),
    _latent("linear_kv_up_proj", "kv_b_proj", "k_and_v", "kv_rank"),
    _latent("linear_proj", "o_proj", "hidden", "v", "row"),
)
_BIAS = Rule("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",), ("experts",), fp32=True)
_PREDICTION = (
    Rule("enorm.weight", ("enorm.weight",), ("hidden",)),
    Rule("hnorm.weight", ("hnorm.weight",), ("hidden",)),
    Rule("eh_proj.weight", ("eh_proj.weight",), ("hidden",), "two_hidden", split="column", extra_state="both"),
    Rule("final_layernorm.weight", ("shared_head.norm.weight",), ("hidden",)),
)


def _dims(arch: Mapping[str, Any]) -> dict[str, int]:
    heads, expert = arch["num_attention_heads"], arch["moe_intermediate_size"]
    nope, rope, value = arch["qk_nope_head_dim"], arch["qk_rope_head_dim"], arch["v_head_dim"]
    rank = arch["q_lora_rank"] or 0
    return {
        **common_dims(arch),
        "dense": arch["first_k_dense_replace"],
        "experts": arch["n_routed_experts"],
        "expert_ffn": expert,
        "shared_ffn": expert * arch["n_shared_experts"],
        "two_hidden": 2 * arch["hidden_size"],
        "latent_query": int(rank > 0),
        "plain_query": int(rank == 0),
        "q_rank": rank,
        "kv_rank": arch["kv_lora_rank"],
        "kv_rank_and_rope": arch["kv_lora_rank"] + rope,
        "q": heads * (nope + rope),
        "k_and_v": heads * (nope + value),
        "v": heads * value,
    }


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    dims=_dims,
    outer=OUTER,
    layer=(*NORMS, *_ATTENTION),
    dense=gated_mlp("mlp.", "ffn"),
    moe=(ROUTER, _BIAS, *gated_mlp("mlp.shared_experts.", "shared_ffn")),
    expert=gated_mlp("", "expert_ffn"),
    prediction=_PREDICTION,
    copies={"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"},
    dropped=OLD_BUFFERS,
)
