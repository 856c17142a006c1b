"""What stages need of each other, an order that serves them all, and graphs that cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.load import load
from megatron_r1.config.run import RunConfig
from megatron_r1.pipeline.graph import Need, makes, needs, run_order, start_source

HEAD = """
name = "demo"
model.preset = "tiny-moe"
models.student = { preset = "tiny-dense" }
tokenizer.kind = "char"
"""
PROMPTS = 'prompts = { source = "generator", task = "chain_sum" }'
BASE = """
[[stage]]
kind = "pretrain"
name = "base"
steps = 1
optimizer.lr = 1e-3
corpus = [{ styles = { steps = 1 } }]
"""
ZERO = f"""
[[stage]]
kind = "grpo"
name = "zero"
steps = 4
optimizer.lr = 3e-6
{PROMPTS}
sampling = {{ max_new_tokens = 16 }}
reward = [{{ kind = "accuracy" }}]
"""
COLD = f'[[stage]]\nkind = "sample"\nname = "cold"\nfrom = "zero"\n{PROMPTS}\n'
SFT = '[[stage]]\nkind = "sft"\nname = "dev1"\nfrom = "base"\nepochs = 1\nformat = "r1"\ndata = { stage = "cold" }\n'
RM = """
[[stage]]
kind = "preferences"
name = "pairs"
from = "zero"
judge.call = "json:dumps"
prompts = { source = "generator", task = "chain_sum" }

[[stage]]
kind = "reward_model"
name = "helpful"
from = "dev1"
steps = 1
optimizer.lr = 1e-3
pairs = { stage = "pairs" }
"""
EVAL = f'[[stage]]\nkind = "eval"\nname = "look"\n{PROMPTS}\n'


def config(folder: Path, *stages: str) -> RunConfig:
    path = folder / "recipe.toml"
    path.write_text(HEAD + "\n".join(stages), encoding="utf-8")
    return load(path, [])


def names(found: RunConfig) -> list[str]:
    return [found.stage[i].name for i in run_order(found)]


def test_what_each_stage_reads(tmp_path: Path) -> None:
    found = config(tmp_path, BASE, ZERO, COLD, SFT, RM, EVAL)
    assert [needs(found, i) for i in range(len(found.stage))] == [
        [],
        [Need("from", "base", "weights")],  # without `from`: the last stage before it with a language model
        [Need("from", "zero", "weights")],
        [Need("from", "base", "weights"), Need("data.stage", "cold", "conversations")],
        [Need("from", "zero", "weights")],
        [Need("from", "dev1", "weights"), Need("pairs.stage", "pairs", "pairs")],
        [Need("from", "dev1", "weights")],  # the reward model after it makes no language model
    ]
    assert [makes(stage) for stage in found.stage] == [
        *("weights", "weights", "conversations", "weights", "pairs", "reward model", "nothing")
    ]


def test_stages_run_as_written_wherever_that_is_possible(tmp_path: Path) -> None:
    assert names(config(tmp_path, BASE, ZERO, COLD, SFT, RM)) == ["base", "zero", "cold", "dev1", "pairs", "helpful"]
    zero = ZERO.replace("[[stage]]", '[[stage]]\nfrom = "base"')
    assert names(config(tmp_path, BASE, SFT, COLD, zero)) == ["base", "zero", "cold", "dev1"]


def test_a_student_begins_with_its_own_model(tmp_path: Path) -> None:
    student = BASE.replace('"base"', '"small"') + 'model = "student"\n'
    tuned = SFT.replace('from = "base"\n', "").replace('"dev1"', '"distilled"') + 'model = "student"\n'
    found = config(tmp_path, BASE, ZERO, student, COLD, tuned, EVAL)
    assert start_source(found, 4) == "small"
    assert start_source(found, 5) == "zero"
    wrong = config(tmp_path, BASE, student, ZERO.replace("[[stage]]", '[[stage]]\nfrom = "small"'))
    with pytest.raises(
        UserError, match=r"stage\.zero\.from = 'small': weights of \[model\] are wanted.*trains \[models"
    ):
        run_order(wrong)


def test_a_cycle_is_named(tmp_path: Path) -> None:
    round_trip = config(tmp_path, BASE, SFT, COLD.replace('from = "zero"', 'from = "dev1"'))
    with pytest.raises(
        UserError, match=r"need each other, so none of them can run first: (dev1 needs cold needs dev1|co)"
    ):
        run_order(round_trip)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((BASE, ZERO, SFT), r"stage\.dev1\.data\.stage = 'cold': there is no such stage \(stages: base, zero, dev1\)"),
        (
            (BASE, SFT.replace('"cold"', '"base"')),
            r"a pretrain stage makes the weights of a language model, and conver",
        ),
        ((BASE, EVAL, ZERO.replace("[[stage]]", '[[stage]]\nfrom = "look"')), "an eval stage makes no weights"),
        (
            (BASE, ZERO, COLD, SFT, RM, ZERO.replace('"zero"', '"late"') + 'from = "helpful"'),
            "makes a reward model, which has no output layer",
        ),
    ],
)
def test_a_stage_that_makes_something_else_is_refused(tmp_path: Path, stages: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_order(config(tmp_path, *stages))
