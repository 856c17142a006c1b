"""How many parameters an architecture has, counted from its config.json with pencil and paper."""

from __future__ import annotations

from typing import Any


def count_parameters(arch: dict[str, Any]) -> int:
    """Parameters without multi-token prediction and without the router's balancing bias, which is a buffer."""
    hidden, layers = arch["hidden_size"], arch["num_hidden_layers"]
    embeddings = arch["vocab_size"] * hidden * (1 if arch.get("tie_word_embeddings") else 2)
    attention = _latent(arch) if arch["model_type"] == "deepseek_v3" else _grouped(arch)
    dense = 0 if arch["model_type"] == "qwen3_moe" else arch.get("first_k_dense_replace", layers)
    mlp = dense * 3 * hidden * arch["intermediate_size"]
    if layers > dense:
        expert = 3 * hidden * arch["moe_intermediate_size"]
        experts = arch["num_experts"] if "num_experts" in arch else arch["n_routed_experts"]
        mlp += (layers - dense) * ((experts + arch.get("n_shared_experts", 0)) * expert + experts * hidden)
    return embeddings + layers * (attention + 2 * hidden) + mlp + hidden


def _grouped(arch: dict[str, Any]) -> int:
    heads, groups, hidden = arch["num_attention_heads"], arch["num_key_value_heads"], arch["hidden_size"]
    width = arch.get("head_dim") or hidden // heads
    weights = 2 * heads * width * hidden + 2 * groups * width * hidden
    biases = (heads + 2 * groups) * width if arch["model_type"] == "qwen2" else 0
    return weights + biases + (2 * width if arch["model_type"] in ("qwen3", "qwen3_moe") else 0)


def _latent(arch: dict[str, Any]) -> int:
    heads, hidden, q_rank, rank = (
        arch[key] for key in ("num_attention_heads", "hidden_size", "q_lora_rank", "kv_lora_rank")
    )
    nope, rope, value = arch["qk_nope_head_dim"], arch["qk_rope_head_dim"], arch["v_head_dim"]
    queries = heads * (nope + rope)
    query = hidden * queries if q_rank is None else hidden * q_rank + q_rank + q_rank * queries
    return query + hidden * (rank + rope) + rank + rank * heads * (nope + value) + heads * value * hidden
