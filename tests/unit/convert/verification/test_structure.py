"""A folder's names and shapes against transformers' own model; the conversion table is not asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.convert.correspondence import Correspondence
from megatron_r1.convert.formats.hf_files import read_hf
from megatron_r1.convert.storage import Archive
from megatron_r1.convert.verification.structure import check_structure
from megatron_r1.model.presets import load_architecture
from tests.reference.synthetic_hf import write_family


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "llama-tied"])
def test_structure_sees_what_transformers_would_miss(family: str, tmp_path: Path) -> None:
    write_family(tmp_path, family)
    archive, table = read_hf(tmp_path), Correspondence(load_architecture(tmp_path))
    good_one = check_structure(archive, table)
    predicted = sum(name.startswith("model.layers.2.") for name in archive.tensors) if family == "deepseek_v3" else 0
    assert good_one.state == "ok", good_one.details
    assert good_one.numbers["compared"] == len(archive.tensors) - predicted
    names = (
        ["model.layers.1.mlp.experts.3.gate_proj.weight"] if "llama" not in family else ["model.embed_tokens.weight"]
    )
    if family == "deepseek_v3":
        names.append("model.layers.1.mlp.gate.e_score_correction_bias")
    for name in names:
        tensors = {other + "x" * (other == name): value for other, value in archive.tensors.items()}
        renamed = check_structure(Archive(tmp_path, "hf", tensors), table)
        assert renamed.state == "failed"
        assert sorted(line.split(":")[0] for line in renamed.details) == [name, name + "x"]
    shape = archive.tensors["model.norm.weight"]
    wrong = {**archive.tensors, "model.norm.weight": type(shape)(shape.name, shape.dtype, (255,), shape.chunks)}
    assert check_structure(Archive(tmp_path, "hf", wrong), table).details == [
        "model.norm.weight: is [255], transformers has [256]"
    ]


def test_a_config_that_transformers_refuses(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    archive, table = read_hf(tmp_path), Correspondence(load_architecture(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": "many"}))
    found = check_structure(archive, table)
    assert found.state == "failed" and "transformers cannot build" in found.summary
