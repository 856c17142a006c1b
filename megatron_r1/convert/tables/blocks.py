"""Rows that several families share: embeddings, grouped-query attention, gated MLPs, and the sizes they name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1.convert.tables.rule import Rule

OUTER = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab",), "hidden", split="vocab"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
    Rule("output_layer.weight", ("lm_head.weight",), ("vocab",), "hidden", split="vocab", when="untied"),
)
NORMS = (
    Rule("input_layernorm.weight", ("input_layernorm.weight",), ("hidden",)),
    Rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), ("hidden",)),
)
_QKV = tuple(f"self_attn.{x}_proj" for x in "qkv")
GROUPED_QUERY = (
    Rule(
        "self_attention.linear_qkv.weight",
        tuple(f"{x}.weight" for x in _QKV),
        ("q", "kv", "kv"),
        "hidden",
        layout="qkv",
        split="column",
        fp8=True,
        extra_state="both",
    ),
    Rule(
        "self_attention.linear_proj.weight",
        ("self_attn.o_proj.weight",),
        ("hidden",),
        "q",
        split="row",
        fp8=True,
        extra_state="both",
    ),
)
QKV_BIAS = (
    Rule(
        "self_attention.linear_qkv.bias",
        tuple(f"{x}.bias" for x in _QKV),
        ("q", "kv", "kv"),
        layout="qkv",
        split="column",
    ),
)
QK_NORMS = (
    Rule("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), ("head",)),
    Rule("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), ("head",)),
)
ROUTER = Rule("mlp.router.weight", ("mlp.gate.weight",), ("experts",), "hidden")
OLD_BUFFERS = {r".*\.rotary_emb\.inv_freq": "a buffer of old checkpoints, computed from rope_theta"}


def gated_mlp(prefix: str, ffn: str) -> tuple[Rule, Rule]:
    """A gated MLP whose names begin with `prefix` in both formats; ffn: the name of its width."""
    fc1 = Rule(
        f"{prefix}linear_fc1.weight",
        (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"),
        (ffn, ffn),
        "hidden",
        layout="gate_up",
        split="gate_up",
        fp8=True,
        extra_state="both",
    )
    down = (f"{prefix}down_proj.weight",)
    fc2 = Rule(f"{prefix}linear_fc2.weight", down, ("hidden",), ffn, split="row", fp8=True, extra_state="both")
    return fc1, fc2


def common_dims(arch: Mapping[str, Any]) -> dict[str, int]:
    """Sizes that every family has. layers: of the decoder; dense: leading ones without experts."""
    return {
        "layers": arch["num_hidden_layers"],
        "dense": arch["num_hidden_layers"],
        "predictions": arch.get("num_nextn_predict_layers") or 0,
        "vocab": arch["vocab_size"],
        "hidden": arch["hidden_size"],
        "ffn": arch["intermediate_size"],
        "experts": 0,
        "untied": int(not arch.get("tie_word_embeddings")),
    }


def grouped_query_dims(arch: Mapping[str, Any]) -> dict[str, int]:
    """`common_dims` and the sizes of grouped-query attention."""
    heads = arch["num_attention_heads"]
    groups = arch.get("num_key_value_heads") or heads
    head = arch.get("head_dim") or arch["hidden_size"] // heads
    return {**common_dims(arch), "groups": groups, "head": head, "q": heads * head, "kv": groups * head}
