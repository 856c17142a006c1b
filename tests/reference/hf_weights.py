"""Weights of a transformers model under the names and layouts of Megatron's GPTModel, whole tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

Weights = dict[str, torch.Tensor]

_OUTER = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
_INNER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "self_attn.q_a_proj.weight": "self_attention.linear_q_down_proj.weight",
    "self_attn.q_a_layernorm.weight": "self_attention.q_layernorm.weight",
    "self_attn.q_b_proj.weight": "self_attention.linear_q_up_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "self_attention.linear_kv_down_proj.weight",
    "self_attn.kv_a_layernorm.weight": "self_attention.kv_layernorm.weight",
    "self_attn.kv_b_proj.weight": "self_attention.linear_kv_up_proj.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.e_score_correction_bias": "mlp.router.expert_bias",
}


def to_megatron(source: Mapping[str, torch.Tensor], heads: int, groups: int, latent: bool) -> Weights:
    """Every tensor of `source` (a transformers state_dict) renamed; raises KeyError for one it does not know.

    latent: multi-latent attention, whose q_proj stands alone; else q, k and v are interleaved by key-value group.
    """
    left = dict(source)
    made = {name: left.pop(key) for key, name in _OUTER.items() if key in left}
    for layer in sorted({int(key.split(".")[2]) for key in left}):
        prefix = f"model.layers.{layer}."
        part = {key.removeprefix(prefix): left.pop(key) for key in list(left) if key.startswith(prefix)}
        made |= {f"decoder.layers.{layer}.{name}": w for name, w in _layer(part, heads, groups, latent).items()}
    if left:
        raise KeyError(f"no Megatron name for {sorted(left)}")
    return made


def _layer(part: Weights, heads: int, groups: int, latent: bool) -> Weights:
    made = {name: part.pop(key) for key, name in _INNER.items() if key in part}
    if latent:
        if "self_attn.q_proj.weight" in part:
            made["self_attention.linear_q_proj.weight"] = part.pop("self_attn.q_proj.weight")
    else:
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" in part:
                qkv = [part.pop(f"self_attn.{x}_proj.{kind}") for x in "qkv"]
                made[f"self_attention.linear_qkv.{kind}"] = _interleave(*qkv, heads=heads, groups=groups)
    if "mlp.experts.gate_up_proj" in part:  # transformers 5 stacks the experts
        for j, (up, down) in enumerate(
            zip(part.pop("mlp.experts.gate_up_proj"), part.pop("mlp.experts.down_proj"), strict=True)
        ):
            made[f"mlp.experts.local_experts.{j}.linear_fc1.weight"] = up
            made[f"mlp.experts.local_experts.{j}.linear_fc2.weight"] = down
    for key in [key for key in part if key.endswith("gate_proj.weight")]:
        stem = key.removesuffix("gate_proj.weight")
        name = re.sub(r"experts\.(\d+)\.", r"experts.local_experts.\1.", stem)
        made[f"{name}linear_fc1.weight"] = torch.cat([part.pop(key), part.pop(f"{stem}up_proj.weight")])
        made[f"{name}linear_fc2.weight"] = part.pop(f"{stem}down_proj.weight")
    if part:
        raise KeyError(f"no Megatron name for {sorted(part)}")
    return made


def _interleave(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int, groups: int) -> torch.Tensor:
    """For every key-value group: its query heads, its key, its value."""
    width, rest = q.shape[0] // heads, q.shape[1:]
    parts = (x.view(groups, -1, width, *rest) for x in (q, k, v))
    return torch.cat(tuple(parts), dim=1).reshape(-1, *rest)
