"""Architectures: published sizes, either spelling of a config.json, and every refusal with its cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig, ParallelConfig
from megatron_r1.model.presets import FAMILIES, architecture, has_experts, load_architecture, preset_names
from megatron_r1.parallel import cpu_backend
from megatron_r1.parallel.world import World
from tests.reference.parameters import count_parameters

TOKENS = 101  # of the char tokenizer: what the presets without a vocabulary get

# As their releases say: 671B, 8.03B, 70.6B, 16B, 1.54B, 14.8B, 32.8B, 7.62B, 30.5B, 8.19B; without the router's biases
# (58 x 256 in DeepSeek-V3).
PUBLISHED = {
    "deepseek-v3": 671_026_404_352,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "moonlight-16b-a3b": 15_960_108_544,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-math-1.5b": 1_543_714_304,
    "qwen2.5-math-7b": 7_615_616_512,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-8b": 8_190_735_360,
}
TINY = ("tiny-dense", "tiny-moe")

QWEN2: dict[str, Any] = dict(
    model_type="qwen2",
    vocab_size=200,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
)
QWEN3_MOE: dict[str, Any] = {
    **QWEN2,
    **dict(model_type="qwen3_moe", moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True),
}
YARN = dict(factor=4.0, original_max_position_embeddings=64, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def shipped(name: str, **override: Any) -> dict[str, Any]:
    return architecture(ModelConfig(preset=name, override=override), TOKENS)


def from_file(folder: Path, config: dict[str, Any], tokens: int = TOKENS) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(config))
    return architecture(ModelConfig(config=folder), tokens)


def refusal(folder: Path, config: Any) -> str:
    with pytest.raises(UserError) as caught:
        from_file(folder, config)
    return str(caught.value)


def built_parameters(world: World, monkeypatch: pytest.MonkeyPatch, arch: dict[str, Any], mtp: bool = False) -> int:
    """Parameters of the model, built on the meta device."""
    from megatron_r1.model.build import build_model

    monkeypatch.setattr(cpu_backend, "device", torch.device("meta"))
    with torch.device("meta"):
        (model,) = build_model(arch, ModelConfig(preset="tiny-moe", mtp=mtp), world)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    return sum(p.numel() for p in model.parameters())


def test_the_shipped_presets_are_these() -> None:
    assert preset_names() == sorted([*PUBLISHED, *TINY])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    assert count_parameters(shipped(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", [*PUBLISHED, *TINY])
def test_the_built_model_has_the_counted_parameters(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The first dense layers and two with experts; the rest are their repetition."""
    whole = shipped(name)
    for layers in (1, whole.get("first_k_dense_replace", 0) + 2):
        arch = {**whole, "num_hidden_layers": layers}
        if "first_k_dense_replace" in arch:
            arch["first_k_dense_replace"] = min(layers, whole["first_k_dense_replace"])
        assert built_parameters(world, monkeypatch, arch) == count_parameters(arch)


@pytest.mark.slow
def test_all_671_billion(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert built_parameters(world, monkeypatch, shipped("deepseek-v3")) == PUBLISHED["deepseek-v3"]


def test_the_tiny_presets_are_tiny() -> None:
    for name in TINY:
        assert 300_000 <= count_parameters(shipped(name)) <= 1_500_000, name


def test_multi_token_prediction_adds_one_layer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformer layer like the last one, eh_proj [H, 2 H], three norms."""
    arch = shipped("tiny-moe")
    layers, hidden = arch["num_hidden_layers"], arch["hidden_size"]
    layer = count_parameters({**arch, "num_hidden_layers": layers + 1}) - count_parameters(arch)
    expected = layer + 2 * hidden * hidden + 3 * hidden
    added = built_parameters(world, monkeypatch, arch, mtp=True) - built_parameters(world, monkeypatch, arch)
    assert added == expected


@pytest.mark.parametrize("name", [*PUBLISHED, *TINY])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_preset_is_a_valid_megatron_config(world: World, name: str, precision: str) -> None:
    from megatron_r1.model.megatron_config import transformer_config

    model = ModelConfig(preset=name, precision=precision)
    config = transformer_config(shipped(name), model, ParallelConfig(), on_cpu=True)
    assert config.params_dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert config.bf16 is (precision == "bf16")


def test_published_values() -> None:
    """The keys on which releases of a family differ; from their config.json files."""
    qwen = {name: shipped(f"qwen2.5-{name}") for name in ("1.5b", "7b", "14b", "32b")}
    assert [a["rms_norm_eps"] for a in qwen.values()] == [1e-6, 1e-6, 1e-5, 1e-5]
    assert [a["vocab_size"] for a in qwen.values()] == [151936, 152064, 152064, 152064]
    assert [a["tie_word_embeddings"] for a in qwen.values()] == [True, False, False, False]
    assert {(a["rope_theta"], a["max_position_embeddings"]) for a in qwen.values()} == {(1e6, 131072)}
    for size in ("1.5b", "7b"):
        maths = shipped(f"qwen2.5-math-{size}")
        differing = {key for key in maths if maths[key] != qwen[size][key]}
        assert differing == {"rope_theta", "max_position_embeddings"}
        assert (maths["rope_theta"], maths["max_position_embeddings"]) == (1e4, 4096)
    for size in ("3.1-8b", "3.3-70b"):
        llama = shipped(f"llama-{size}")
        assert (llama["rope_theta"], llama["rms_norm_eps"], llama["vocab_size"]) == (5e5, 1e-5, 128256)
        assert llama["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    assert (llama["num_attention_heads"], llama["num_key_value_heads"]) == (64, 8)
    moonlight = shipped("moonlight-16b-a3b")
    assert (moonlight["rope_theta"], moonlight["rms_norm_eps"], moonlight["rope_scaling"]) == (5e4, 1e-5, None)
    assert (moonlight["routed_scaling_factor"], moonlight["q_lora_rank"]) == (2.446, None)
    for name in ("qwen3-8b", "qwen3-30b-a3b"):
        qwen3 = shipped(name)
        assert (qwen3["rope_theta"], qwen3["rms_norm_eps"], qwen3["max_position_embeddings"]) == (1e6, 1e-6, 40960)
        assert (qwen3["vocab_size"], qwen3["head_dim"], qwen3["tie_word_embeddings"]) == (151936, 128, False)
    assert (qwen3["num_experts"], qwen3["num_experts_per_tok"], qwen3["norm_topk_prob"]) == (128, 8, True)
    v3 = shipped("deepseek-v3")
    assert v3["rope_scaling"] == {"rope_type": "yarn", **YARN, "factor": 40.0, "original_max_position_embeddings": 4096}


def test_a_preset_without_a_vocabulary_takes_the_tokenizer_s() -> None:
    assert shipped("tiny-moe")["vocab_size"] == TOKENS
    assert shipped("tiny-moe", vocab_size=128)["vocab_size"] == 128
    assert shipped("qwen2.5-7b")["vocab_size"] == 152064


def test_overrides_replace_keys_and_unknown_ones_are_refused() -> None:
    assert shipped("tiny-dense", num_hidden_layers=2)["num_hidden_layers"] == 2
    scaled = shipped("llama-3.1-8b", rope_scaling={"type": "llama3", **LLAMA3, "factor": 32.0})
    assert scaled["rope_scaling"] == {"rope_type": "llama3", **LLAMA3, "factor": 32.0}
    with pytest.raises(UserError, match=r"model\.override\.num_layers: qwen2 .*; did you mean .*num_hidden_layers"):
        shipped("tiny-dense", num_layers=2)


def test_unknown_presets_are_refused_with_a_hint() -> None:
    with pytest.raises(UserError, match="there is no 'tiny_moe'; did you mean 'tiny-moe'"):
        shipped("tiny_moe")


def test_either_spelling_of_rotary_embeddings(tmp_path: Path) -> None:
    plain = {k: v for k, v in QWEN2.items() if k != "rope_theta"}
    new = from_file(tmp_path, {**plain, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert (new["rope_theta"], new["rope_scaling"]) == (5e5, None)
    assert "rope_parameters" not in new
    assert new == from_file(tmp_path, {**plain, "rope_theta": 5e5})
    llama = {**plain, "model_type": "llama"}
    new = from_file(tmp_path, {**llama, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}})
    assert new["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    assert new == from_file(tmp_path, {**llama, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}})


def test_a_file_or_its_folder(tmp_path: Path) -> None:
    folder = from_file(tmp_path, QWEN2)
    assert architecture(ModelConfig(config=tmp_path / "config.json"), TOKENS) == folder


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_are_named(tmp_path: Path, family: str) -> None:
    said = refusal(tmp_path, {"model_type": family, "hidden_size": 32, "vocab_size": 200})
    assert str(tmp_path / "config.json") in said and f"a {family} architecture needs" in said
    lacking = said.split(" lacks ")[1].split(", which")[0].split(", ")
    assert {"rms_norm_eps", "rope_theta", "num_hidden_layers", "max_position_embeddings"} <= set(lacking)
    assert ("head_dim" in lacking) is (family == "qwen3")
    assert ("topk_group" in lacking) is (family == "deepseek_v3")
    assert ({"num_experts", "norm_topk_prob"} <= set(lacking)) is (family == "qwen3_moe")
    assert "hidden_size" not in lacking


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported for qwen2"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias = True"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias = True"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"type": "yarn", **YARN}}, "type 'yarn' is not supported for qwen2"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "type 'linear' is not supported"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 2.0}},
            "high_freq_factor = 4",
        ),
        ({"model_type": "gpt2"}, "model_type 'gpt2'; supported: qwen2, qwen3, qwen3_moe, llama, deepseek_v3"),
        ({"vocab_size": 64}, "the tokenizer has 101 tokens but the model's vocab_size is 64"),
    ],
)
def test_what_would_silently_be_another_model_is_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, {**QWEN2, **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"rope_interleave": False}, "rope_interleave = False"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, "it can have 'yarn' or none"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "mscale, mscale_all_dim; add them"),
    ],
)
def test_the_same_for_deepseek_v3(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, {**shipped("tiny-moe"), **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported for qwen3_moe"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers = [0] is not supported for qwen3_moe"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_scaling": {"type": "yarn", **YARN}}, "type 'yarn' is not supported for qwen3_moe"),
    ],
)
def test_the_same_for_qwen3_moe(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, {**QWEN3_MOE, **fields})


def test_either_spelling_of_the_number_of_experts(tmp_path: Path) -> None:
    """transformers 5 writes num_local_experts, the released files have num_experts."""
    plain = from_file(tmp_path, {**QWEN3_MOE, "decoder_sparse_step": 1, "mlp_only_layers": []})
    assert plain["num_experts"] == 8 and has_experts(plain)
    other = {**plain, "num_local_experts": plain["num_experts"]}
    del other["num_experts"]
    assert from_file(tmp_path, other) == plain
    assert not has_experts(from_file(tmp_path, QWEN2)) and has_experts(shipped("tiny-moe"))


@pytest.mark.parametrize("config", [QWEN2, QWEN3_MOE], ids=["qwen2", "qwen3_moe"])
def test_conversion_loads_the_architecture_of_a_run(tmp_path: Path, config: dict[str, Any]) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    whole = from_file(tmp_path, {**config, **rope})
    assert load_architecture(tmp_path) == load_architecture(tmp_path / "config.json") == whole


def test_conversion_misses_no_key_that_changes_no_tensor(tmp_path: Path) -> None:
    """But those that do, and what would be another model, are refused under the file's name."""
    v3 = shipped("tiny-moe")
    running = ("rope_theta", "rms_norm_eps", "max_position_embeddings", "n_group", "topk_group", "num_experts_per_tok")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({key: value for key, value in v3.items() if key not in running}))
    assert load_architecture(tmp_path)["kv_lora_rank"] == v3["kv_lora_rank"]
    with pytest.raises(UserError, match=r"lacks .*rope_theta"):
        architecture(ModelConfig(config=tmp_path), TOKENS)
    for config, words in (
        ({key: value for key, value in v3.items() if key != "kv_lora_rank"}, f"{file} lacks kv_lora_rank, which a"),
        ({**v3, "vocab_size": None}, f"{file}: vocab_size is null"),
        ({**v3, "topk_method": "greedy"}, f"{file}: topk_method = 'greedy' is not supported"),
        ({**v3, "rope_interleave": False}, f"{file}: rope_interleave = False is not supported"),
        ({**v3, "model_type": "gpt2"}, f"{file} has model_type 'gpt2'"),
    ):
        file.write_text(json.dumps(config))
        with pytest.raises(UserError) as caught:
            load_architecture(tmp_path)
        assert str(caught.value).startswith(words)
    with pytest.raises(UserError, match=r"^there is no file"):
        load_architecture(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        (QWEN2, {"use_sliding_window": True}),
        (QWEN2, {"rope_scaling": {"type": "yarn", **YARN}}),
        (QWEN2, {"hidden_act": "gelu"}),
        (QWEN3_MOE, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        (shipped("tiny-moe"), {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        (shipped("tiny-moe"), {"scoring_func": "softmax"}),
    ],
)
def test_conversion_takes_what_changes_no_tensor(tmp_path: Path, base: dict[str, Any], fields: dict[str, Any]) -> None:
    """It copies config.json as it is; a run computes with it, and refuses."""
    (tmp_path / "config.json").write_text(json.dumps({**base, "vocab_size": 200, **fields}))
    assert load_architecture(tmp_path)["hidden_size"] == base["hidden_size"]
    with pytest.raises(UserError, match="not supported"):
        architecture(ModelConfig(config=tmp_path), TOKENS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_shared_experts": None}, "n_shared_experts is None; it should be a whole number from 1 on"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'; it should be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 32.0}, r"hidden_size is 32\.0"),
        ({"moe_intermediate_size": [16]}, r"moe_intermediate_size is \[16\]"),
        ({"q_lora_rank": "16"}, "q_lora_rank is '16'; it should be a whole number from 0 on, or null"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
        ({"first_k_dense_replace": None}, "first_k_dense_replace is None"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it should be true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it should be a table"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; it should be a table"),
    ],
)
def test_values_of_a_wrong_type_are_named(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    v3 = {**shipped("tiny-moe"), "vocab_size": 200}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**v3, **fields}))
    with pytest.raises(UserError, match=f"^{file}: {words}"):
        load_architecture(tmp_path)
    file.write_text(json.dumps({**v3, "q_lora_rank": None, "num_nextn_predict_layers": None}))
    assert load_architecture(tmp_path)["q_lora_rank"] is None


def test_heads_that_cannot_be_grouped_are_refused(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps({**QWEN2, **heads}))
    with pytest.raises(UserError, match="num_attention_heads = 8 is no multiple of num_key_value_heads = 3"):
        load_architecture(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000])
def test_what_is_no_text_is_no_traceback(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    for read in (load_architecture, lambda path: architecture(ModelConfig(config=path), TOKENS)):
        with pytest.raises(UserError, match="is not readable JSON"):
            read(tmp_path)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*config\.json; give a Hugging Face"):
        architecture(ModelConfig(config=tmp_path), TOKENS)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not readable JSON"):
        architecture(ModelConfig(config=tmp_path), TOKENS)
    assert "model_type 'list'" in refusal(tmp_path, [])
