"""An export stage through the command line: the folder it writes is the checkpoint, and a stage can start from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_r1.observe.metrics import read_metrics
from tests.e2e.recipes import RECIPE, finish

MORE = """
[[stage]]
name = "hf"
kind = "export"
from = "pretrain"
dtype = "fp32"

[[stage]]
name = "from-hf"
kind = "pretrain"
from = "hf"
steps = 2
batch_tokens = 512
optimizer = { lr = 1e-3 }
corpus = [{ options = { terms = 2 }, styles = { direct = 1.0 } }]

[[stage]]
name = "from-megatron"
kind = "pretrain"
from = "pretrain"
steps = 2
batch_tokens = 512
optimizer = { lr = 1e-3 }
corpus = [{ options = { terms = 2 }, styles = { direct = 1.0 } }]

[[stage]]
name = "judge"
kind = "eval"
from = "hf"
problems = 4
k = 2
prompts = { source = "generator", task = "chain_sum", options = { terms = 2 }, size = 4, seed = 9, template = "plain" }
sampling = { max_new_tokens = 10 }
"""
# Fewer prompts than the recipe's: the same questions held out everywhere, two ranks with their own experts.
LAYOUT = ["parallel.expert=2"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    pretrain = "\n[[stage]]\n".join(RECIPE.split("\n[[stage]]\n")[:2]).replace("steps = 60", "steps = 6")
    (folder / "recipe.toml").write_text(pretrain + MORE, encoding="utf-8")
    process = finish("run", folder / "recipe.toml", "--run-dir", folder / "run", *LAYOUT)
    assert process.returncode == 0, process.stderr
    assert "is unknown" not in process.stderr  # the evaluation followed the weights back through the export
    return folder / "run"


def test_the_stage_writes_what_the_command_writes(exported: Path, tmp_path: Path) -> None:
    (checkpoint,) = (exported / "pretrain" / "checkpoints").glob("step-*6")
    process = finish("convert", "export", checkpoint, tmp_path / "hf", "--dtype", "fp32")
    assert process.returncode == 0, process.stderr
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (exported / "hf" / "hf" / name).read_bytes()
    state = next(s for s in json.loads((exported / "stages.json").read_text())["stages"] if s["name"] == "hf")
    assert state["result"]["export/bytes"] == (tmp_path / "hf" / "model.safetensors").stat().st_size


def test_transformers_loads_it_without_a_missing_key(exported: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(exported / "hf" / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(name.startswith("model.layers.2.") for name in info["unexpected_keys"])  # multi-token prediction
    stored = load_file(exported / "hf" / "hf" / "model.safetensors")
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])


def test_a_stage_from_the_folder_trains_as_one_from_the_checkpoint(exported: Path) -> None:
    one, other = (
        [row["loss/lm"] for row in read_metrics(exported / name / "metrics.jsonl")]
        for name in ("from-hf", "from-megatron")
    )
    assert len(one) == 2 and one == other


def test_weights_of_another_model_are_refused_before_anything_starts(exported: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(exported / "hf" / "hf", wrong)
    (wrong / "manifest.json").unlink()
    tensors = load_file(wrong / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    process = finish(
        "run", exported / "recipe.toml", "--run-dir", tmp_path / "run", f'stage.from-megatron.from="{wrong}"', *LAYOUT
    )
    assert process.returncode == 2 and not (tmp_path / "run").exists()
    assert "model.norm.weight is [7] instead of [32]" in process.stderr, process.stderr


def test_an_export_like_another_model_is_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        (exported / "hf" / "hf" / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 64')
    )
    process = finish(
        "run", exported / "recipe.toml", "--run-dir", tmp_path / "run", f'stage.hf.like="{tmp_path}"', *LAYOUT
    )
    assert process.returncode == 2
    assert "another model than the one trained: hidden_size = 64 instead of 32" in process.stderr, process.stderr
