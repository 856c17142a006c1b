"""Where a reward_model stage starts from, what may start from it, and what is refused before the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.load import load
from megatron_r1.pipeline.run import preflight, start_of

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
    path = folder / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_language_models_and_reward_models_start_from_language_models(tmp_path: Path) -> None:
    config = load(recipe(tmp_path), [])
    names = [stage.name for stage in config.stage]
    assert names == ["base", "helpful", "safety", "rl", "final"]
    run = Path("run")
    assert [start_of(config, i, run) for i in range(5)] == [
        None, run / "base", run / "base", run / "base", run / "rl",
    ]  # fmt: skip


def test_a_reward_model_may_go_on_from_another(tmp_path: Path) -> None:
    config = load(recipe(tmp_path), ['stage.safety.from="helpful"'])
    preflight(config, 1)
    assert start_of(config, 2, Path("run")) == Path("run/helpful")


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
        (["stage.helpful.max_length=6"], r"no pair of pairs\.jsonl has both sequences within 6 tokens"),
        (['stage.safety.pairs.path="none.jsonl"'], r"pairs\.path: '.*none\.jsonl' does not exist"),
        (
            ['stage.safety.heldout={source="jsonl",path="none.jsonl"}'],
            r"pairs\.path: '.*none\.jsonl' does not exist",
        ),
    ],
)
def test_refusals(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight(load(recipe(tmp_path), overrides), 1)
