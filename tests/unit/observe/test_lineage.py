"""Which weights a stage begins with, read from plain tables: as the pipeline itself decides."""

from __future__ import annotations

from pathlib import Path

from megatron_r1.config.load import dump, load
from megatron_r1.observe.lineage import read_config, weights_of_stages
from megatron_r1.observe.rundir import RunDir
from megatron_r1.pipeline.graph import start_source

STAGE = """
[[stage]]
name = "{name}"
kind = "{kind}"
{more}
"""
PROMPTS = 'prompts = { source = "generator", task = "chain_sum" }'
TRAIN = f"steps = 1\noptimizer.lr = 1e-3\n{PROMPTS}\n"
REWARD = TRAIN + 'reward = [{ kind = "accuracy" }]'
STAGES = [
    ("base", "pretrain", "steps = 1\noptimizer.lr = 1e-3\ncorpus = [{ styles = { direct = 1.0 } }]"),
    ("eval-base", "eval", PROMPTS),
    ("zero", "grpo", REWARD),
    ("rm", "reward_model", 'steps = 1\noptimizer.lr = 1e-3\npairs = { source = "jsonl", path = "p.jsonl" }'),
    ("eval-zero", "eval", PROMPTS),
    ("answers", "sample", PROMPTS),
    ("mix", "mix", 'sources = [{ source = "jsonl", path = "c.jsonl" }]'),
    ("student", "sft", 'steps = 1\nmodel = "small"\nfrom = "./hf"\ndata = { source = "jsonl", path = "c.jsonl" }'),
    ("eval-student", "eval", f'model = "small"\n{PROMPTS}'),
    ("eval-main", "eval", PROMPTS),
    ("hf-out", "export", 'model = "small"'),
    ("eval-out", "eval", f'model = "small"\nfrom = "hf-out"\n{PROMPTS}'),
]


def test_the_tables_say_what_the_pipeline_does(tmp_path: Path) -> None:
    text = 'name = "t"\nmodel.preset = "tiny-moe"\nmodels.small.preset = "tiny-dense"\ntokenizer.kind = "char"\n'
    text += "".join(STAGE.format(name=name, kind=kind, more=more) for name, kind, more in STAGES)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    config = load(recipe)
    (tmp_path / "resolved.toml").write_text(dump(config))
    _, tables = read_config(RunDir(tmp_path))
    found = weights_of_stages(tables)
    assert found == {stage.name: start_source(config, i) for i, stage in enumerate(config.stage)}
    assert (found["base"], found["eval-zero"], found["mix"], found["eval-main"]) == (None, "zero", None, "zero")
    assert (found["eval-student"], found["hf-out"], found["eval-out"]) == ("student", "student", "hf-out")
