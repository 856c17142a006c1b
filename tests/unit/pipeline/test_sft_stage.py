"""An sft stage before the start: its steps, where it starts from, what is refused and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.load import dump, load
from megatron_r1.pipeline.graph import start_source
from megatron_r1.pipeline.inputs import with_steps
from megatron_r1.pipeline.preflight import preflight
from tests.unit.data.chat_folders import CHATML, write_tokenizer

RECIPE = """
name = "demo"
model.preset = "tiny-moe"
tokenizer.kind = "char"

[[stage]]
kind = "sft"
name = "cold"
epochs = 2.5
batch = 3
format = "r1"
template = "plain"
data = { source = "jsonl", path = "chat.jsonl" }

[[stage]]
kind = "grpo"
name = "rl"
steps = 4
optimizer.lr = 3e-6
prompts = { source = "generator", task = "chain_sum" }
sampling = { max_new_tokens = 16 }
reward = [{ kind = "accuracy" }]

[[stage]]
kind = "sft"
name = "mix"
steps = 7
from = "rl"
format = "r1"
template = "plain"
data = { source = "jsonl", path = "chat.jsonl" }
"""


def recipe(folder: Path, text: str = RECIPE) -> Path:
    rows = [{"prompt": f"{i}?", "response": "x" * i} for i in range(1, 9)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_epochs_become_steps(tmp_path: Path) -> None:
    config = load(recipe(tmp_path), [])
    preflight(config, 1)
    planned = [with_steps(stage) for stage in config.stage]
    assert [getattr(stage, "steps", None) for stage in planned] == [7, 4, 7]  # ceil(8 x 2.5 / 3)
    (tmp_path / "resolved.toml").write_text(dump(config))
    assert load(tmp_path / "resolved.toml") == config  # with steps = 0, so that a start anew counts anew


def test_stages_start_from_one_another(tmp_path: Path) -> None:
    config = load(recipe(tmp_path), [])
    assert [start_source(config, i) for i in range(3)] == [None, "cold", "rl"]


def test_an_end_of_turn_that_sampling_would_not_stop_at_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    text = RECIPE.replace('kind = "char"', 'kind = "huggingface"\ntokenizer.path = "tokenizer"')
    text = text.replace("preset", "override = { vocab_size = 300 }\nmodel.preset", 1)
    preflight(load(recipe(tmp_path, text.replace('format = "r1"\ntemplate = "plain"', 'format = "chat"')), []), 1)
    assert "stage.cold: a turn ends with '<|im_end|>'" in caplog.text
    assert "sampling.stop = ['<|im_end|>']" in caplog.text
    caplog.clear()
    preflight(load(recipe(tmp_path, text), []), 1)
    assert "a turn ends with" not in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage.cold.steps=5"], r"stage\.cold: give exactly one of `steps` and `epochs`"),
        (["stage.mix.steps=0"], r"stage\.mix: give exactly one of `steps` and `epochs`"),
        (['stage.mix.format="chat"', "stage.mix.template=r1-zero"], "char tokenizer has no chat template"),
        (["stage.cold.template=Solve"], r"template 'Solve' has no \{prompt\} field"),
        (['stage.cold.format="deepseek"'], r"`template` has no effect with format = \"deepseek\"; it belongs"),
        (['stage.mix.optimizer={lr=1e-5,min_lr=2e-5}'], r"min_lr \(2e-05\) is the floor"),
        (['stage.cold.data.path="none.jsonl"'], r"data\.path: '.*none\.jsonl' does not exist"),
        (['stage.cold.heldout={source="jsonl",path="none.jsonl"}'], r"data\.path: '.*none\.jsonl' does not exist"),
        (["stage.mix.max_length=2"], r"none of the 8 conversations of chat\.jsonl can be trained on"),
        (["model.mtp=false", "stage.mix.mtp_loss=0.2"], r"stage\.mix\.mtp_loss = 0\.2 without effect"),
        (["model.preset=tiny-dense", "stage.mix.expert_bias=updated"], r"stage\.mix\.expert_bias = \"updated\""),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight(load(recipe(tmp_path), overrides), 1)
