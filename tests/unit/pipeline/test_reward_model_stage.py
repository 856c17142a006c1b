"""Where a reward_model stage starts from, what may start from it, and what is refused before the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.load import load
from megatron_r1.pipeline.graph import start_source
from megatron_r1.pipeline.preflight import preflight

RECIPE = """
name = "demo"
model.preset = "tiny-moe"
tokenizer.kind = "char"

[[stage]]
kind = "pretrain"
name = "base"
steps = 5
optimizer.lr = 1e-3
corpus = [{ styles = { steps = 1.0 } }]

[[stage]]
kind = "reward_model"
name = "helpful"
steps = 4
optimizer.lr = 6e-6
pairs = { source = "jsonl", path = "pairs.jsonl" }

[[stage]]
kind = "reward_model"
name = "safety"
steps = 4
optimizer.lr = 6e-6
pairs = { source = "jsonl", path = "pairs.jsonl" }

[[stage]]
kind = "reward_model"
name = "point"
steps = 4
loss = "pointwise"
optimizer.lr = 6e-6
labels = { path = "labels.jsonl" }

[[stage]]
kind = "grpo"
name = "rl"
steps = 4
optimizer.lr = 3e-6
prompts = { source = "generator", task = "chain_sum" }
sampling = { max_new_tokens = 16 }
reward = [{ kind = "accuracy" }]

[[stage]]
kind = "eval"
name = "final"
prompts = { source = "generator", task = "chain_sum" }
sampling = { max_new_tokens = 16 }
"""


def recipe(folder: Path) -> Path:
    pair = {"prompt": "1+1=?", "chosen": "2", "rejected": "3"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    label = {"prompt": "1+1=?", "response": "2", "label": 1}
    (folder / "labels.jsonl").write_text(json.dumps(label) + "\n", encoding="utf-8")
    path = folder / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_language_models_and_reward_models_start_from_language_models(tmp_path: Path) -> None:
    config = load(recipe(tmp_path), [])
    names = [stage.name for stage in config.stage]
    assert names == ["base", "helpful", "safety", "point", "rl", "final"]
    assert [start_source(config, i) for i in range(6)] == [None, "base", "base", "base", "base", "rl"]


def test_a_reward_model_may_go_on_from_another(tmp_path: Path) -> None:
    config = load(recipe(tmp_path), ['stage.safety.from="helpful"'])
    preflight(config, 1)
    assert start_source(config, 2) == "helpful"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ['stage.rl.from="helpful"'],
            r"from = 'helpful': that stage makes a reward model, .*only a reward_model stage",
        ),
        (
            ['stage.final.from="safety"'],
            r"from = 'safety': that stage makes a reward model, .*only a reward_model stage",
        ),
        (
            ['parallel.dispatcher="allgather"', "stage.helpful.max_length=64", "stage.helpful.micro_batch_tokens=100"],
            r"micro_batch_tokens = 100 with parallel\.dispatcher = \"allgather\".*set micro_batch_tokens = 128",
        ),
        (["stage.helpful.max_length=6"], r"no pair of pairs\.jsonl keeps within 6 tokens a sequence"),
        (['stage.safety.pairs.path="none.jsonl"'], r"pairs\.path: '.*none\.jsonl' does not exist"),
        (
            ['stage.safety.heldout={source="jsonl",path="none.jsonl"}'],
            r"pairs\.path: '.*none\.jsonl' does not exist",
        ),
        (['stage.point.labels.path="none.jsonl"'], r"labels\.path: '.*none\.jsonl' does not exist"),
        (
            ['stage.point.labels.response_key="answer"'],
            r"labels\.jsonl:1: no column 'answer'.*Set response_key",
        ),
        (["stage.point.max_length=6"], r"no labelled answer of labels\.jsonl keeps within 6 tokens a sequence"),
        (
            ['parallel.dispatcher="allgather"', "stage.point.max_length=64", "stage.point.micro_batch_tokens=60"],
            r"1 of 64 tokens \(max_length\) must fit into one; set micro_batch_tokens = 64",
        ),
    ],
)
def test_refusals(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight(load(recipe(tmp_path), overrides), 1)
