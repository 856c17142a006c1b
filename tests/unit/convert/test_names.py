"""Megatron's spellings of a tensor: every one is read as the same name, and what is written is read back."""

from __future__ import annotations

import pytest

from megatron_r1.convert.names import ALIASES, Place, Spelling, parse, places, shard_key, spell
from megatron_r1.convert.storage import Stored

LAYER = "decoder.layers.7."
# Keys as Megatron-Core 0.16.1 writes them -> (canonical name with {} for stacked indices, stacked axes, half).
KEYS: dict[str, tuple[str, int, int | None]] = {
    "embedding.word_embeddings.weight": ("embedding.word_embeddings.weight", 0, None),
    "output_layer.weight": ("output_layer.weight", 0, None),
    "decoder.final_layernorm.weight": ("decoder.final_layernorm.weight", 0, None),
    # Homogeneous layers are stacked, others carry their number.
    "decoder.layers.self_attention.linear_proj.weight": (
        "decoder.layers.{}.self_attention.linear_proj.weight",
        1,
        None,
    ),
    "decoder.layers.7.self_attention.linear_proj.weight": (f"{LAYER}self_attention.linear_proj.weight", 0, None),
    # Transformer Engine's fused norms.
    f"{LAYER}self_attention.linear_qkv.layer_norm_weight": (f"{LAYER}input_layernorm.weight", 0, None),
    f"{LAYER}self_attention.linear_q_up_proj.layer_norm_weight": (f"{LAYER}self_attention.q_layernorm.weight", 0, None),
    f"{LAYER}self_attention.linear_kv_up_proj.layer_norm_weight": (
        f"{LAYER}self_attention.kv_layernorm.weight",
        0,
        None,
    ),
    f"{LAYER}mlp.linear_fc1.layer_norm_weight": (f"{LAYER}pre_mlp_layernorm.weight", 0, None),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": ("decoder.layers.{}.pre_mlp_layernorm.weight", 1, None),
    f"{LAYER}self_attention.q_layernorm.weight": (f"{LAYER}self_attention.q_layernorm.weight", 0, None),
    # Experts: stacked, one by one, as modules' own names have them.
    f"{LAYER}mlp.experts.experts.linear_fc1.weight": (f"{LAYER}mlp.experts.{{}}.linear_fc1.weight", 1, None),
    "decoder.layers.mlp.experts.experts.linear_fc2.weight": (
        "decoder.layers.{}.mlp.experts.{}.linear_fc2.weight",
        2,
        None,
    ),
    f"{LAYER}mlp.experts.experts.12.linear_fc2.weight": (f"{LAYER}mlp.experts.12.linear_fc2.weight", 0, None),
    f"{LAYER}mlp.experts.local_experts.12.linear_fc1.weight": (f"{LAYER}mlp.experts.12.linear_fc1.weight", 0, None),
    "decoder.layers.mlp.experts.local_experts.12.linear_fc1.weight": (
        "decoder.layers.{}.mlp.experts.12.linear_fc1.weight",
        1,
        None,
    ),
    f"{LAYER}mlp.experts.linear_fc2.weight12": (f"{LAYER}mlp.experts.12.linear_fc2.weight", 0, None),
    f"{LAYER}mlp.shared_experts.linear_fc1.weight": (f"{LAYER}mlp.shared_experts.linear_fc1.weight", 0, None),
    f"{LAYER}mlp.router.expert_bias": (f"{LAYER}mlp.router.expert_bias", 0, None),
    # Halves of gated layers.
    f"{LAYER}mlp.linear_fc1.weight_w": (f"{LAYER}mlp.linear_fc1.weight", 0, 0),
    f"{LAYER}mlp.linear_fc1.weight_v": (f"{LAYER}mlp.linear_fc1.weight", 0, 1),
    f"{LAYER}mlp.experts.experts.3.linear_fc1.weight_v": (f"{LAYER}mlp.experts.3.linear_fc1.weight", 0, 1),
    "decoder.layers.mlp.linear_fc1.weight_w": ("decoder.layers.{}.mlp.linear_fc1.weight", 1, 0),
    # Multi-token prediction, in both spellings.
    "mtp.layers.0.eh_proj.weight": ("mtp.layers.0.eh_proj.weight", 0, None),
    "mtp.layers.0.transformer_layer.self_attention.linear_proj.weight": (
        "mtp.layers.0.transformer_layer.self_attention.linear_proj.weight",
        0,
        None,
    ),
    "mtp.layers.0.mtp_model_layer.self_attention.linear_kv_up_proj.layer_norm_weight": (
        "mtp.layers.0.transformer_layer.self_attention.kv_layernorm.weight",
        0,
        None,
    ),
    "mtp.layers.1.mtp_model_layer.mlp.experts.experts.linear_fc1.weight": (
        "mtp.layers.1.transformer_layer.mlp.experts.{}.linear_fc1.weight",
        1,
        None,
    ),
}


@pytest.mark.parametrize("key", KEYS)
def test_what_a_key_means(key: str) -> None:
    found = parse(key)
    assert (found.template, found.axes, found.half) == KEYS[key]


def test_stacked_indices_fill_the_name_in_order() -> None:
    parsed = parse("decoder.layers.mlp.experts.experts.linear_fc1.weight")
    assert parsed.canonical((4, 17)) == "decoder.layers.4.mlp.experts.17.linear_fc1.weight"
    assert parse("output_layer.weight").canonical(()) == "output_layer.weight"


def test_a_stacked_tensor_holds_every_layer_and_expert() -> None:
    stored = Stored("decoder.layers.mlp.experts.experts.linear_fc2.weight", "BF16", (3, 2, 8, 16), ())
    found = dict(places(stored))
    assert found == {
        f"decoder.layers.{layer}.mlp.experts.{expert}.linear_fc2.weight": Place(stored, (layer, expert))
        for layer in range(3)
        for expert in range(2)
    }
    half = Stored("decoder.layers.5.mlp.linear_fc1.weight_v", "BF16", (8, 16), ())
    assert dict(places(half)) == {"decoder.layers.5.mlp.linear_fc1.weight": Place(half, (), 1)}


FUSED = {canonical: fused for fused, canonical in ALIASES.items()}


@pytest.mark.parametrize("layers", [None, 9])
@pytest.mark.parametrize("fused", [{}, FUSED])
def test_what_is_spelled_is_read_back(layers: int | None, fused: dict[str, str]) -> None:
    names = {parse(key).canonical((7, 5)) for key in KEYS if parse(key).axes in (0, 2)}
    assert len(names) > 15
    for name in names:
        spelling = spell(name, fused, layers, 24)
        parsed = parse(spelling.key)
        assert parsed.canonical(spelling.lead) == name
        assert parsed.axes == len(spelling.lead) == len(spelling.stack)


def test_how_names_are_spelled() -> None:
    norm = "decoder.layers.7.self_attention.kv_layernorm.weight"
    fused = "self_attention.linear_kv_up_proj.layer_norm_weight"
    assert spell(norm, FUSED, None, 0) == Spelling(f"decoder.layers.7.{fused}", (), ())
    assert spell(norm, {}, None, 0) == Spelling(norm, (), ())
    expert = "decoder.layers.7.mlp.experts.3.linear_fc1.weight"
    stacked = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert spell(expert, FUSED, 9, 24) == Spelling(stacked, (7, 3), (9, 24))
    # Prediction layers are never stacked; their experts are.
    predicting = "mtp.layers.0.transformer_layer.mlp.experts.3.linear_fc2.weight"
    one = "mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc2.weight"
    assert spell(predicting, FUSED, 9, 24) == Spelling(one, (3,), (24,))
    assert spell("output_layer.weight", FUSED, 9, 24) == Spelling("output_layer.weight", (), ())


def test_names_of_objects_say_where_they_are() -> None:
    """Against keys of a checkpoint that Megatron-Core 0.16.1 wrote."""
    alone = "decoder.layers.0.self_attention.linear_proj._extra_state"
    assert shard_key(alone, (), ()) == f"{alone}/shard_0_1"
    stacked = "decoder.layers.mlp.experts.experts.linear_fc1._extra_state"
    assert shard_key(stacked, (2, 5), (4, 8)) == f"{stacked}/shard_2.5_4.8"
