"""The closing table and the full one: rows, columns and order by hand; several problem sets, missing values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.observe.evaluations import closing_markdown, closing_rows, closing_text, evaluation_table
from megatron_r1.observe.names import check_names, for_benchmark, is_known, metric_of, of_benchmark
from megatron_r1.observe.rundir import RunDir, StageState
from megatron_r1.pipeline.summary import write_summary

RECIPE = """
name = "toy"
[[stage]]
name = "base"
kind = "pretrain"
[[stage]]
name = "eval-base"
kind = "eval"
[[stage]]
name = "zero"
kind = "grpo"
[[stage]]
name = "eval-zero"
kind = "eval"
row = "R1-Zero"
[[stage]]
name = "eval-hf"
kind = "eval"
from = "models/qwen"
"""


def measured(benchmark: str | None, accuracy: float, **more: float) -> dict[str, Any]:
    values = {
        "eval/pass_at_1": accuracy,
        "eval/cons_at_k": accuracy + 0.1,
        "eval/pass_at_k": accuracy + 0.2,
        "eval/format": 0.987654,
        "eval/truncated": 0.0,
        "eval/length": 41.5,
        "eval/k": 4.0,
        "eval/problems": 8.0,
    } | {f"eval/{name}": value for name, value in more.items()}
    return {for_benchmark(name, benchmark): value for name, value in values.items()}


def a_run(folder: Path, *results: dict[str, Any]) -> RunDir:
    run = RunDir(folder)
    run.resolved.write_text(RECIPE)
    evals = [StageState(name=n, kind="eval") for n in ("eval-base", "eval-zero", "eval-hf")]
    for state, result in zip(evals, results, strict=False):
        state.state, state.result = "done", result
    base = StageState(name="base", kind="pretrain", state="done", started=100.0, finished=3725.04)
    zero = StageState(name="zero", kind="grpo", state="done", started=5000.0)
    run.write_stages([base, evals[0], zero, *evals[1:]])
    return run


def test_weights_that_are_made_anew_have_no_row(tmp_path: Path) -> None:
    run = a_run(tmp_path, measured("aime", 0.25), measured("aime", 0.5))
    assert [row["row"] for row in closing_rows(run)] == ["base", "R1-Zero"]
    run.update_stage("zero", state="running")
    assert [row["row"] for row in closing_rows(run)] == ["base"]


def test_one_row_a_finished_evaluation(tmp_path: Path) -> None:
    first = measured("aime", 0.25, language=0.5) | measured("safety", 1.0)
    run = a_run(tmp_path, first | {"styles/aime": {"direct": 3}}, measured("aime", 1 / 3))
    common = {"format": 0.9877, "mean_tokens": 41.5}
    rows = closing_rows(run)
    assert rows == [
        {
            **{"row": "base", "stage": "eval-base", "accuracy": 0.25, "cons@4": 0.35, "pass@4": 0.45, "language": 0.5},
            **common,
            **{"safety": 1.0, "problems": 8, "seconds": 3625.0},
        },
        {
            **{"row": "R1-Zero", "stage": "eval-zero", "accuracy": 0.3333, "cons@4": 0.4333, "pass@4": 0.5333},
            **common,
            **{"problems": 8, "seconds": None},  # zero is not done
        },
    ]
    title, columns, cells = closing_text(rows)
    assert title == "8 held-out problems, 4 samples each"
    assert columns == ["", "accuracy", "cons@4", "pass@4", "language", "format", "tokens", "safety", "time"]
    assert cells == [
        ["base", "25.0 %", "35.0 %", "45.0 %", "50.0 %", "98.8 %", "41.5", "100.0 %", "1:00:25"],
        ["R1-Zero", "33.3 %", "43.3 %", "53.3 %", "-", "98.8 %", "41.5", "-", "-"],
    ]


def test_the_table_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path, measured(None, 0.5))
    run.resolved.write_text(RECIPE.replace('name = "eval-base"', 'name = "eval-base"\nrow = "a|b"'))
    assert closing_markdown(closing_rows(run)) == (
        "| 8 held-out problems, 4 samples each | accuracy | cons@4 | pass@4 | format | tokens | time |\n"
        "|---|---|---|---|---|---|---|\n"
        "| a\\|b | 50.0 % | 60.0 % | 70.0 % | 98.8 % | 41.5 | 1:00:25 |\n"
    )
    write_summary(run)
    assert json.loads(run.summary_file.read_text()) == closing_rows(run)
    assert capsys.readouterr().out.splitlines()[0] == "8 held-out problems, 4 samples each"


def test_rows_that_agree_in_name_show_their_stage_and_other_sizes_their_columns(tmp_path: Path) -> None:
    other = measured(None, 0.5, problems=3.0, k=8.0)
    run = a_run(tmp_path, measured(None, 0.25), other)
    run.resolved.write_text(RECIPE.replace("R1-Zero", "base"))
    title, columns, cells = closing_text(closing_rows(run))
    assert title == "held-out problems"
    heads = ["", "stage", "accuracy", "cons@4", "cons@8", "pass@4", "pass@8", "format", "tokens", "problems", "time"]
    assert columns == heads
    assert [row[:5] for row in cells] == [
        ["base", "eval-base", "25.0 %", "35.0 %", "-"],
        ["base", "eval-zero", "50.0 %", "-", "60.0 %"],
    ]
    assert [row[-2] for row in cells] == ["8", "3"]


def test_weights_from_a_folder_and_a_lost_recipe(tmp_path: Path) -> None:
    run = a_run(tmp_path, measured(None, 0.25), measured(None, 0.25), measured(None, 0.25))
    assert [row["row"] for row in closing_rows(run)] == ["base", "R1-Zero", "qwen"]
    run.resolved.unlink()
    assert [row["row"] for row in closing_rows(run)] == ["eval-base", "eval-zero", "eval-hf"]


def test_nothing_is_written_before_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path)
    write_summary(run)
    assert not run.summary_file.exists() and capsys.readouterr().out == ""
    run.resolved.write_text("= no TOML")
    with pytest.raises(UserError, match=r"resolved\.toml: not TOML"):
        closing_rows(run)


def test_every_set_has_its_rows_in_the_full_table() -> None:
    both = measured("b", 0.5, **{"language": 1.0, "language/zh": 1.0}) | measured("a", 0.25, k=2.0)
    table = evaluation_table(
        [StageState(name="x", kind="eval", result=both), StageState(name="y", kind="eval", result=measured(None, 1.0))]
    )
    assert table is not None and table.columns == ["", "x", "y"]
    assert [row[0] for row in table.rows] == [
        *("b pass@1", "b cons@4", "b pass@4", "b format", "b language", "b language zh", "b truncated"),
        *("b length", "b samples a problem", "b problems"),
        *("a pass@1", "a cons@2", "a pass@2", "a format", "a truncated", "a length", "a samples a problem"),
        *("a problems", "pass@1", "cons@4", "pass@4", "format", "truncated", "length", "samples a problem", "problems"),
    ]
    assert ["a cons@2", "35.0%", "-"] in table.rows and ["pass@1", "-", "100.0%"] in table.rows


def test_names_of_benchmarks() -> None:
    assert of_benchmark("eval/aime/pass_at_1") == ("aime", "eval/pass_at_1")
    assert of_benchmark("eval/language/language/zh") == ("language", "eval/language/zh")
    for plain in ("eval/language/zh", "eval/format", "reward/accuracy", "eval/aime/nothing", "eval/A b/format"):
        assert of_benchmark(plain) == (None, plain)
    assert for_benchmark("eval/language/zh", "x") == "eval/x/language/zh"
    assert metric_of("eval/aime/length") == metric_of("eval/length") and metric_of("eval/aime/language/zh") is not None
    check_names(["eval/aime-2024/cons_at_k", "eval/x/language_prompts/en"])
    assert not is_known("eval/aime/reward") and not is_known("reward/aime/mean") and not is_known("eval//format")
