"""The conversion tables: every tensor of every architecture, once, where transformers and Megatron have it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config.errors import UserError
from megatron_r1.convert.correspondence import Correspondence
from megatron_r1.convert.inspecting import Inventory, plan_both_ways, planned_hf
from megatron_r1.model.presets import preset_names
from tests.reference.hf_weights import to_megatron
from tests.reference.parameters import count_parameters
from tests.reference.synthetic_hf import FAMILIES, random_weights, write_family

PRESETS = Path(__file__).parents[3] / "megatron_r1" / "model" / "presets"

# (dtype, tensors, bytes): what model.safetensors.index.json of the released checkpoints says. Moonlight's is counted:
# 26 x (64 x 3 experts' + 3 shared + router and bias) + 27 x 7 of attention and norms + 3 dense + 3 outer tensors.
SIZES: dict[str, tuple[str, int, int]] = {
    "deepseek-v3": ("fp8", 91_991, 688_574_839_360),
    "moonlight-16b-a3b": ("bf16", 5_317, 31_920_223_744),
    "qwen2.5-1.5b": ("bf16", 338, 3_087_428_608),
    "qwen2.5-7b": ("bf16", 339, 15_231_233_024),
    "qwen2.5-32b": ("bf16", 771, 65_527_752_704),
    "llama-3.1-8b": ("bf16", 291, 16_060_522_496),
    "qwen3-8b": ("bf16", 399, 16_381_470_720),
    "qwen3-30b-a3b": ("bf16", 18_867, 61_064_245_248),
}


def preset(name: str) -> dict[str, Any]:
    arch: dict[str, Any] = json.loads((PRESETS / f"{name}.json").read_text())
    return arch if arch["vocab_size"] else {**arch, "vocab_size": 101}


@pytest.mark.parametrize("name", SIZES)
def test_released_models_have_their_published_size(name: str) -> None:
    dtype, number, size = SIZES[name]
    found = Inventory("hf", planned_hf(Correspondence(preset(name)), dtype).tensors).summary()
    assert (found["tensors"], found["bytes"]) == (number, size)


@pytest.mark.parametrize("name", sorted(preset_names()))
def test_every_preset_has_all_its_parameters(name: str) -> None:
    """Against the count by hand, which leaves out prediction layers and the router's bias."""
    arch = preset(name)
    table = Correspondence(arch, predictions=False)
    archive = planned_hf(table, "bf16")
    biases = sum(t.shape[0] for n, t in archive.tensors.items() if n.endswith("e_score_correction_bias"))
    assert Inventory("hf", archive.tensors).summary()["parameters"] - biases == count_parameters(arch)


@pytest.mark.parametrize("name", [n for n in sorted(preset_names()) if n not in ("deepseek-v3", "qwen3-30b-a3b")])
@pytest.mark.parametrize("spec", ["te", "local"])
def test_every_preset_can_be_planned_both_ways(name: str, spec: Any) -> None:
    table = Correspondence(preset(name))
    found = plan_both_ways(table, "bf16", spec, 10**10)
    assert found["export"]["tensors"] == len(table.hf_names)
    payload = planned_hf(table, "bf16").bytes
    assert 0 < found["export"]["bytes"] - payload < 300 * len(table.hf_names) + 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-30b-a3b"])
def test_the_largest_presets_can_be_planned_both_ways(name: str) -> None:
    table = Correspondence(preset(name))
    found = plan_both_ways(table, "fp8" if name == "deepseek-v3" else "bf16", "te", 10**10)
    assert found["export"]["tensors"] == SIZES[name][1]


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, torch.Tensor]]:
    """float32 weights of every family, as transformers' save_pretrained writes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {family: random_weights(config, 0) for family, config in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_what_transformers_saves(family: str, weights: Any) -> None:
    """The prediction layer is a decoder layer of transformers and DeepSeek-V3's six tensors more."""
    table = Correspondence(FAMILIES[family])
    saved = {name: tuple(value.shape) for name, value in weights[family].items()}
    assert {name: table.hf_shape(name) for name in table.hf_names} == saved


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_lie_where_the_slow_reference_puts_them(family: str, weights: Any) -> None:
    """Every Megatron tensor made from the table's runs equals the one that views and concatenations make."""
    config = FAMILIES[family]
    table = Correspondence(config, predictions=False)
    source = {name: value for name, value in weights[family].items() if name in table.hf}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    expected = to_megatron(source, heads, groups, table.family.name == "deepseek_v3")
    expected = {name.replace("experts.local_experts.", "experts."): value for name, value in expected.items()}
    assert table.entries.keys() == expected.keys()
    for name, entry in table.entries.items():
        made = torch.full(entry.shape, torch.nan)
        for run in entry.runs:
            rows = source[entry.hf[run.tensor]][run.hf_row : run.hf_row + run.rows]
            assert made[run.megatron_row : run.megatron_row + run.rows].isnan().all(), f"{name}: rows written twice"
            made[run.megatron_row : run.megatron_row + run.rows] = rows
        assert torch.equal(made, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_each_tensor_has_one_place(family: str) -> None:
    table = Correspondence(FAMILIES[family])
    assert len(table.hf_names) == len(set(table.hf_names))
    for name, (entry, which) in table.hf.items():
        assert entry.hf[which] == name and table.entries[entry.name] is entry
    for entry in table.entries.values():
        megatron = sorted((run.megatron_row, run.megatron_row + run.rows) for run in entry.runs)
        assert [end for _, end in megatron] == [begin for begin, _ in megatron[1:]] + [entry.shape[0]]
        for which, rows in enumerate(entry.rows):
            there = sorted((run.hf_row, run.hf_row + run.rows) for run in entry.runs if run.tensor == which)
            assert there[0][0] == 0 and [end for _, end in there] == [begin for begin, _ in there[1:]] + [rows]


def test_prediction_layers_follow_the_decoder_and_repeat_embedding_and_head() -> None:
    table = Correspondence({**FAMILIES["deepseek_v3"], "num_nextn_predict_layers": 2})
    assert table.predictions == 2
    layer = "model.layers.3."
    assert table.hf[f"{layer}eh_proj.weight"][0].name == "mtp.layers.1.eh_proj.weight"
    assert table.hf[f"{layer}shared_head.norm.weight"][0].name == "mtp.layers.1.final_layernorm.weight"
    assert table.hf[f"{layer}self_attn.o_proj.weight"][0].name == (
        "mtp.layers.1.transformer_layer.self_attention.linear_proj.weight"
    )
    assert table.copies == {
        f"model.layers.{i}.{name}": of
        for i in (2, 3)
        for name, of in (
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("shared_head.head.weight", "lm_head.weight"),
        )
    }
    assert table.hf_shape(f"{layer}embed_tokens.weight") == table.hf_shape("model.embed_tokens.weight")
    without = Correspondence({**FAMILIES["deepseek_v3"], "num_nextn_predict_layers": 2}, predictions=False)
    assert without.predictions == 0 and not without.copies
    assert not [name for name in without.entries if name.startswith("mtp.")]


def test_what_may_be_left_out_and_why() -> None:
    deepseek = Correspondence(FAMILIES["deepseek_v3"], predictions=False)
    assert deepseek.drop_reason("model.layers.2.eh_proj.weight") == "multi-token prediction is left out"
    assert Correspondence(FAMILIES["deepseek_v3"]).drop_reason("model.layers.3.eh_proj.weight") is None
    llama = Correspondence(FAMILIES["llama"])
    assert llama.drop_reason("lm_head.weight") is None
    assert llama.drop_reason("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert llama.drop_reason("model.layers.0.self_attn.q_proj.bias") is None


def test_fp8_quantises_what_released_checkpoints_quantise(tmp_path: Path) -> None:
    """Against the synthetic checkpoint, which follows DeepSeek-V3's list of modules."""
    write_family(tmp_path, "deepseek_v3", fp8=True, shards=1)
    stored = load_file(tmp_path / "model.safetensors")
    planned = planned_hf(Correspondence(FAMILIES["deepseek_v3"]), "fp8").tensors
    assert {name: tuple(value.shape) for name, value in stored.items()} == {n: t.shape for n, t in planned.items()}
    quantised = {name for name, value in stored.items() if value.dtype == torch.float8_e4m3fn}
    assert quantised == {name for name, tensor in planned.items() if tensor.dtype == "F8_E4M3"}
    modules = Correspondence(FAMILIES["deepseek_v3"]).unquantised_modules()
    kept = {n for n, v in stored.items() if v.dim() == 2 and v.dtype == torch.bfloat16 and "embed_tokens" not in n}
    assert {f"{module}.weight" for module in modules} == kept


SPLITS = {
    "embedding.word_embeddings.weight": "vocab",
    "output_layer.weight": "vocab",
    "decoder.final_layernorm.weight": "none",
    "decoder.layers.0.self_attention.linear_q_down_proj.weight": "none",
    "decoder.layers.0.self_attention.linear_q_up_proj.weight": "column",
    "decoder.layers.0.self_attention.linear_proj.weight": "row",
    "decoder.layers.0.mlp.linear_fc1.weight": "gate_up",
    "decoder.layers.0.mlp.linear_fc2.weight": "row",
    "decoder.layers.1.mlp.router.weight": "none",
    "decoder.layers.1.mlp.experts.3.linear_fc1.weight": "gate_up",
    "mtp.layers.0.eh_proj.weight": "column",
    "optimizer.something": "none",
}


def test_how_tensor_parallelism_divides() -> None:
    table = Correspondence(FAMILIES["deepseek_v3"])
    assert {name: table.split(name) for name in SPLITS} == SPLITS


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UserError, match=r"model_type 'gpt2' has no conversion table; there are deepseek_v3, llama"):
        Correspondence({"model_type": "gpt2"})
