"""Benchmarks in a recipe: which problem sets an eval stage asks, all that are held out, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.config.departures import departures
from megatron_r1.config.errors import UserError
from megatron_r1.config.load import load
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import EvalStage
from megatron_r1.pipeline.preflight import preflight

RECIPE = """
name = "t"
model.preset = "tiny-moe"
tokenizer.kind = "char"

[[benchmark]]
name = "sums"
problems = 4
k = 2
prompts = { source = "generator", task = "chain_sum", template = "plain" }
sampling = { max_new_tokens = 16 }

[[benchmark]]
name = "long-sums"
problems = 3
prompts = { source = "generator", task = "chain_sum", template = "plain", seed = 2 }
sampling = { max_new_tokens = 32 }

[[stage]]
name = "base"
kind = "pretrain"
steps = 1
optimizer.lr = 1e-3
corpus = [{ styles = { direct = 1.0 } }]

[[stage]]
name = "shared"
kind = "eval"
benchmarks = ["sums"]

[[stage]]
name = "own"
kind = "eval"
problems = 5
prompts = { source = "generator", task = "chain_sum", template = "plain", seed = 3 }
sampling = { max_new_tokens = 16 }
"""


def recipe(folder: Path, text: str = RECIPE) -> RunConfig:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load(path)


def test_what_a_stage_asks_and_what_is_held_out(tmp_path: Path) -> None:
    config = recipe(tmp_path, RECIPE.replace('benchmarks = ["sums"]', 'benchmarks = ["long-sums", "sums"]'))
    shared, own = (stage for stage in config.stage if isinstance(stage, EvalStage))
    found = [(a.benchmark, a.key, a.table.problems, a.prompts.seed) for a in config.problem_sets(shared)]
    assert found == [("long-sums", "benchmark.long-sums", 3, 2), ("sums", "benchmark.sums", 4, 0)]
    assert [(a.benchmark, a.key, a.table.problems) for a in config.problem_sets(own)] == [(None, "stage.own", 5)]
    everything = [(a.key, a.prompts.seed) for a in recipe(tmp_path).all_problem_sets()]  # one of them nobody asks
    assert everything == [("benchmark.sums", 0), ("benchmark.long-sums", 2), ("stage.own", 3)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('benchmarks = ["sums"]', 'benchmarks = ["sums", "sums"]', "names a benchmark twice: sums, sums"),
        ('benchmarks = ["sums"]', 'benchmarks = ["aime"]', "no such [[benchmark]] (tables: sums, long-sums)"),
        ('name = "long-sums"', 'name = "sums"', "two benchmarks are called 'sums'"),
        ('name = "long-sums"', 'name = "format"', "as a column of the closing table"),
    ],
)
def test_names_that_cannot_be_meant(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(tmp_path, RECIPE.replace(old, new))
    assert message in str(caught.value)


def test_both_kinds_of_sets_are_looked_at_before_the_start(tmp_path: Path) -> None:
    preflight(recipe(tmp_path), 1)
    positions = 4096  # of tiny-moe
    too_long = f"max_new_tokens = {positions}"
    for key, text in (
        ("benchmark.sums", RECIPE.replace("max_new_tokens = 16", too_long, 1)),
        ("stage.own", too_long.join(RECIPE.rsplit("max_new_tokens = 16", 1))),
    ):
        with pytest.raises(UserError, match=rf"{key}\.sampling\.max_new_tokens = {positions} leaves no room"):
            preflight(recipe(tmp_path, text), 1)
    wide = RECIPE.replace('template = "plain" }', f'template = "{"x" * positions}{{prompt}}" }}', 1)
    with pytest.raises(UserError, match=r"benchmark\.sums\.prompts: prompt chain_sum@0:0 has \d+ tokens"):
        preflight(recipe(tmp_path, wide), 1)


def test_departures_of_benchmarks_are_named_once(tmp_path: Path) -> None:
    stages = RECIPE + '[[stage]]\nname = "again"\nkind = "eval"\nbenchmarks = ["sums", "long-sums"]\n'
    found = {departure.key: departure.here for departure in departures(recipe(tmp_path, stages))}
    assert found == {
        "stage.own.sampling.max_new_tokens": "16",
        "benchmark.sums.sampling.max_new_tokens": "16",
        "benchmark.long-sums.sampling.max_new_tokens": "32",
    }
