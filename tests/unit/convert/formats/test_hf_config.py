"""config.json of an export as transformers reads it, and the files copied beside it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, FineGrainedFP8Config
from transformers.quantizers.quantizers_utils import should_convert_module

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig
from megatron_r1.convert.formats.hf_config import (
    Fp8Layout,
    aux_files,
    check_config,
    config_bytes,
    export_config,
    hf_dtype,
    read_aux,
)
from megatron_r1.model.presets import architecture, preset_names

YARN = {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
OLD: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 100, "rope_theta": 1e6, "torch_dtype": "bfloat16"}
NEW: dict[str, Any] = {
    **{"model_type": "qwen2", "vocab_size": 100, "dtype": "bfloat16"},
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
}
V3_QUANTIZATION = {
    **{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"},
    "weight_block_size": [128, 128],
}


def export(source: dict[str, Any], dtype: str = "BF16", fp8: Fp8Layout | None = None, mtp: int = 0) -> dict[str, Any]:
    before = copy.deepcopy(source)
    edited = export_config(source, dtype=dtype, fp8=fp8, mtp_layers=mtp)
    assert source == before  # the source is not touched
    assert set(source) - set(edited) <= {"quantization_config"}
    return edited


def encode(config: dict[str, Any]) -> bytes:
    return json.dumps(config, indent=4).encode()


# ------------------------------------------------------------------------------------------------------------- rope


def test_the_older_rope_spelling_gets_the_newer_one() -> None:
    assert export(OLD)["rope_parameters"] == {"rope_theta": 1e6, "rope_type": "default"}
    scaled = export(OLD | {"rope_scaling": {"type": "yarn", **YARN}})
    assert scaled["rope_parameters"] == {"rope_theta": 1e6, "rope_type": "yarn", **YARN}
    assert scaled["rope_scaling"] == {"type": "yarn", **YARN} and scaled["rope_theta"] == 1e6
    partial = export(OLD | {"partial_rotary_factor": 0.5, "rope_scaling": None})["rope_parameters"]
    assert partial == {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.5}


def test_the_newer_rope_spelling_gets_the_older_one() -> None:
    plain = export(NEW)
    assert plain["rope_theta"] == 1e6 and "rope_scaling" not in plain
    parameters = {"rope_type": "yarn", "rope_theta": 5e4, "partial_rotary_factor": 0.5, **YARN}
    scaled = export(NEW | {"rope_parameters": parameters})
    assert scaled["rope_scaling"] == {"type": "yarn", "rope_type": "yarn", **YARN}
    assert (scaled["rope_theta"], scaled["partial_rotary_factor"]) == (5e4, 0.5)
    assert scaled["rope_parameters"] == parameters


@pytest.mark.parametrize("name", [name for name in preset_names() if "tiny" not in name])
@pytest.mark.parametrize("spelling", ["old", "new", "both"])
def test_every_spelling_is_the_same_model_to_transformers(tmp_path: Path, name: str, spelling: str) -> None:
    source = architecture(ModelConfig(preset=name), 1000)
    both = export(source)
    if spelling == "new":
        source = {key: value for key, value in both.items() if key not in ("rope_theta", "rope_scaling")}
    exported = both if spelling == "both" else export(source)
    older = {key: value for key, value in exported.items() if key != "rope_parameters"}
    newer = {key: value for key, value in exported.items() if key not in ("rope_theta", "rope_scaling")}
    read = []
    for config in (source, exported, older, newer):
        (tmp_path / "config.json").write_bytes(encode(config))
        rope = AutoConfig.from_pretrained(tmp_path).rope_parameters
        read.append({key: value for key, value in rope.items() if key != "type"})
    assert read[0]["rope_theta"] == both["rope_theta"]
    assert read[1] == read[0] and read[2] == read[0] and read[3] == read[0]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rope_theta": 10000.0}, "rope_theta is 10000.0 but"),
        ({"rope_scaling": {"type": "yarn", **YARN}}, "rope_scaling is"),
        ({"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is"),
    ],
)
def test_contradicting_spellings_are_refused(change: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=f"{key}.*Remove the wrong one"):
        export(NEW | change)


def test_what_the_newer_spelling_lacks_comes_from_the_top_level(tmp_path: Path) -> None:
    exported = export(OLD | {"rope_parameters": {"rope_type": "default"}})
    assert exported["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    (tmp_path / "config.json").write_bytes(encode(exported))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 1e6
    assert export(OLD | {"rope_theta": None, "rope_parameters": {"rope_theta": 5.0}})["rope_theta"] == 5.0
    assert export(OLD | {"rope_parameters": {}})["rope_parameters"] == {"rope_theta": 1e6, "rope_type": "default"}


def test_the_number_of_experts_in_both_spellings(tmp_path: Path) -> None:
    """transformers 5 writes num_local_experts; other loaders read num_experts."""
    new = NEW | {"model_type": "qwen3_moe", "num_local_experts": 8}
    exported = export(new)
    assert exported["num_experts"] == exported["num_local_experts"] == 8
    (tmp_path / "config.json").write_bytes(encode(exported))
    assert AutoConfig.from_pretrained(tmp_path).num_experts == 8
    assert "num_local_experts" not in export(NEW | {"model_type": "qwen3_moe", "num_experts": 8})
    assert "num_experts" not in export(NEW | {"num_local_experts": 8})  # of another family: not ours to explain
    with pytest.raises(UserError, match=r"num_experts is 4 but num_local_experts says 8.*Remove the wrong one"):
        export(new | {"num_experts": 4})


FILE = Path("/models/x/config.json")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (V3_QUANTIZATION | {"weight_block_size": [64, 64]}, r"quantization_config.weight_block_size is \[64, 64\]"),
        (V3_QUANTIZATION | {"weight_block_size": None}, "weight_block_size is None"),
        (V3_QUANTIZATION | {"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2', but only 'e4m3'"),
        (V3_QUANTIZATION | {"quant_method": "awq"}, "quantization_config.quant_method is 'awq', but only 'fp8'"),
        ("fp8", "quantization_config is 'fp8'; it should be a table"),
    ],
)
def test_other_quantisation_is_refused_by_its_key(quantization: Any, words: str) -> None:
    with pytest.raises(UserError, match=rf"^{FILE}: .*{words}|^{FILE}: {words}"):
        check_config(OLD | {"quantization_config": quantization}, FILE)


def test_a_source_s_config_is_checked_as_a_whole() -> None:
    for quantization in (None, {}, {"quant_method": "fp8"}, V3_QUANTIZATION, V3_QUANTIZATION | {"scale_fmt": "ue8m0"}):
        check_config(OLD | {"quantization_config": quantization}, FILE)
    config = OLD | {"rope_parameters": {"rope_theta": 7.0}}
    with pytest.raises(UserError, match=f"^{FILE}: rope_theta is 1000000.0 but rope_parameters says 7.0"):
        check_config(config, FILE)
    assert config == OLD | {"rope_parameters": {"rope_theta": 7.0}}


def test_agreeing_spellings_and_what_only_one_can_say_stay() -> None:
    both = NEW | {
        "torch_dtype": "bfloat16",
        "rope_theta": 1000000,
        "rope_scaling": {"type": "yarn", **YARN},
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", **YARN},
    }
    assert export(both) == both
    layered = {"sliding": {"rope_theta": 1e4, "rope_type": "default"}, "full": {"rope_theta": 1e6}}
    exported = export(NEW | {"rope_parameters": layered})
    assert exported["rope_parameters"] == layered and "rope_theta" not in exported
    assert "rope_parameters" not in export({"model_type": "llama"})


# ----------------------------------------------------------------------------------------------------- dtype and FP8


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "bfloat16"), ("F32", "float32"), ("F16", "float16")])
def test_dtype_is_written_in_both_spellings_and_read_back(tmp_path: Path, dtype: str, name: str) -> None:
    for source in (OLD, NEW, {"rope_theta": 1.0, "model_type": "qwen2"}):
        exported = export(source, dtype)
        assert exported["torch_dtype"] == exported["dtype"] == name and hf_dtype(exported) == dtype
    (tmp_path / "config.json").write_bytes(encode(exported))
    assert str(AutoConfig.from_pretrained(tmp_path).dtype) == f"torch.{name}"


def test_hf_dtype() -> None:
    assert hf_dtype({}) is None and hf_dtype({"torch_dtype": None}) is None
    assert hf_dtype({"torch_dtype": "torch.float16"}) == "F16"
    assert hf_dtype({"torch_dtype": "float16", "dtype": "bfloat16"}) == "BF16"  # transformers 5's order
    with pytest.raises(UserError, match=r"dtype is 'auto'; set it to one of .*bfloat16"):
        hf_dtype({"torch_dtype": "auto"})


def test_quantization_is_described_exactly_when_fp8() -> None:
    source = OLD | {"quantization_config": V3_QUANTIZATION}
    assert "quantization_config" not in export(source) and "quantization_config" not in export(OLD)
    assert export(OLD, fp8=Fp8Layout())["quantization_config"] == V3_QUANTIZATION
    assert export(source, fp8=Fp8Layout())["quantization_config"] == V3_QUANTIZATION
    power = export(source, fp8=Fp8Layout(ue8m0=True))["quantization_config"]
    assert power == V3_QUANTIZATION | {"scale_fmt": "ue8m0"}
    again = export(OLD | {"quantization_config": power}, fp8=Fp8Layout(block=(64, 32)))["quantization_config"]
    assert again == V3_QUANTIZATION | {"weight_block_size": [64, 32]}
    other = export(OLD | {"quantization_config": {"quant_method": "awq", "bits": 4}}, fp8=Fp8Layout())
    assert other["quantization_config"] == V3_QUANTIZATION


def test_skipped_modules_are_under_both_spellings() -> None:
    skipped = ("model.layers.3.mlp.gate", "lm_head")
    entry = export(OLD, fp8=Fp8Layout(skipped=skipped))["quantization_config"]
    assert entry["modules_to_not_convert"] == entry["ignored_layers"] == list(skipped)
    # The order of a source that names the same modules stays; a list that is no longer true goes.
    for key in ("modules_to_not_convert", "ignored_layers"):
        source = OLD | {"quantization_config": V3_QUANTIZATION | {key: ["lm_head", "model.layers.3.mlp.gate"]}}
        entry = export(source, fp8=Fp8Layout(skipped=skipped))["quantization_config"]
        assert entry["modules_to_not_convert"] == entry["ignored_layers"] == ["lm_head", "model.layers.3.mlp.gate"]
        entry = export(source, fp8=Fp8Layout())["quantization_config"]
        assert entry["modules_to_not_convert"] == entry["ignored_layers"] == []
    config = FineGrainedFP8Config.from_dict(
        export(OLD, fp8=Fp8Layout(ue8m0=True, skipped=skipped))["quantization_config"]
    )
    assert (config.modules_to_not_convert, config.scale_fmt) == (list(skipped), "ue8m0")
    for name, quantised in {
        **{"lm_head": False, "model.layers.3.mlp.gate": False, "model.layers.3.mlp.gate_proj": True},
        **{"model.layers.31.mlp.gate": True, "model.layers.3.mlp.shared_experts.gate_proj": True},
    }.items():
        assert should_convert_module(name, config.modules_to_not_convert) is quantised


@pytest.mark.parametrize(("has", "layers", "written"), [(1, 0, 0), (0, 1, 1), (1, 1, 1), (None, 2, 2), (None, 0, None)])
def test_next_token_layers_are_what_was_written(has: int | None, layers: int, written: int | None) -> None:
    source = OLD if has is None else OLD | {"num_nextn_predict_layers": has}
    assert export(source, mtp=layers).get("num_nextn_predict_layers") == written


# ---------------------------------------------------------------------------------------------------------- the file


def test_a_config_that_says_the_same_is_the_same_file() -> None:
    raw = b'{"rope_theta": 1e6,\n\t"rope_parameters": {"rope_type":"default", "rope_theta": 1000000.0}, "x": "\\u00e9",'
    raw += b'  "num_nextn_predict_layers": 1, "dtype": "bfloat16", "torch_dtype":"bfloat16" }'
    assert config_bytes(raw, export(json.loads(raw), mtp=1)) == raw
    fp8 = {**json.loads(raw), "quantization_config": V3_QUANTIZATION | {"kept": 1}}
    assert config_bytes(encode(fp8), export(fp8, fp8=Fp8Layout(), mtp=1)) == encode(fp8)
    edited = export(json.loads(raw), mtp=0)
    written = config_bytes(raw, edited)
    assert written != raw and json.loads(written) == edited and written.endswith(b"}\n") and "é".encode() in written
    twice = config_bytes(written, export(json.loads(written)))
    assert twice == written


def test_key_order_is_kept() -> None:
    assert list(export(OLD)) == ["model_type", "vocab_size", "rope_theta", "torch_dtype", "rope_parameters", "dtype"]
    ordered = dict(sorted(OLD.items()))
    assert list(export(ordered, mtp=1)) == sorted([*OLD, "rope_parameters", "dtype", "num_nextn_predict_layers"])


# ------------------------------------------------------------------------------------------------------- other files

COPIED = [
    *("LICENSE", "LICENSE-MODEL", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("chat_templates/tool_use.jinja", "configuration_deepseek.py", "generation_config.json", "merges.txt"),
    *("modeling_deepseek.py", "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "vocab.json", "vocab.txt"),
]
LEFT = [
    *("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md"),
    *("tokenizer.safetensors", "tokenizer.json.part", "inference/model.py", "figures/a.png", ".gitattributes"),
    *("pytorch_model.bin.index.json", "LICENSES/tokenizer.json", "manifest.json"),
]


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 1000)


def test_exactly_the_files_of_the_tokenizer_the_code_and_the_licence_are_read(tmp_path: Path) -> None:
    fill(tmp_path, COPIED + LEFT)
    assert [path.relative_to(tmp_path).as_posix() for path in aux_files(tmp_path)] == sorted(COPIED)
    files, notes = read_aux(tmp_path)
    assert files == {name: name.encode() * 1000 for name in COPIED} and notes == []


def test_a_missing_tokenizer_is_a_note(tmp_path: Path) -> None:
    fill(tmp_path, ["generation_config.json", "tokenizer_config.json"])
    files, notes = read_aux(tmp_path)
    assert sorted(files) == ["generation_config.json", "tokenizer_config.json"]
    assert len(notes) == 1 and "has no tokenizer" in notes[0]


def test_links_of_a_download_cache_are_read_and_broken_ones_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    fill(tmp_path / "blobs", ["abc"])
    source.mkdir()
    (source / "tokenizer.json").symlink_to(tmp_path / "blobs" / "abc")
    assert read_aux(source)[0] == {"tokenizer.json": b"abc" * 1000}
    (tmp_path / "blobs" / "abc").unlink()
    with pytest.raises(UserError, match=r"source/tokenizer\.json: it does not exist"):
        read_aux(source)
