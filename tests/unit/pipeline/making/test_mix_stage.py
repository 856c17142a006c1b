"""The `mix` stage as a whole: data.jsonl, its card, the same bytes after a kill and under other file layouts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.load import load
from megatron_r1.config.stages import MixStage
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.observe.metrics import read_metrics
from megatron_r1.observe.rundir import RunDir
from megatron_r1.parallel.world import World
from megatron_r1.pipeline.decide import inputs_of
from megatron_r1.pipeline.inputs import with_paths
from megatron_r1.pipeline.making.mix import run_mix

RECIPE = """
name = "demo"
seed = 3
model.preset = "tiny-moe"
tokenizer.kind = "char"

[[benchmark]]
name = "sums"
problems = 2
prompts = { source = "jsonl", path = "bench.jsonl", shuffle = false }

[[stage]]
kind = "pretrain"
name = "base"
steps = 1
optimizer.lr = 1e-3
corpus = [{ styles = { steps = 1.0 } }]

[[stage]]
kind = "sample"
name = "reasoning"
prompts = { source = "jsonl", path = "bench.jsonl" }

[[stage]]
kind = "mix"
name = "mix"
size = 9
decontaminate = { files = ["own.jsonl"] }

[[stage.sources]]
stage = "reasoning"
weight = 2.0
domain = "math"

[[stage.sources]]
path = "chat.jsonl"
weight = 1.0
max_bad_rows = 1
"""


def jsonl(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def two_turns(number: int) -> dict[str, Any]:
    said = [("user", f"tell {number}"), ("assistant", "ok"), ("user", "more"), ("assistant", "no")]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    jsonl(tmp_path / "bench.jsonl", [{"question": "7*8=?", "answer": "56"}, {"question": "7*9=?", "answer": "63"}])
    jsonl(tmp_path / "own.jsonl", [{"question": "who are you?"}])
    sampled = [{"prompt": f"{i}+1=?", "response": str(i + 1)} for i in range(10)]
    sampled += [{"prompt": "Now 7*8=?", "response": "56"}, {"prompt": "hm", "response": "Who are you? 7*9=?"}]
    jsonl(tmp_path / "run" / "reasoning" / "data.jsonl", [*sampled, sampled[0]])
    jsonl(tmp_path / "chat.jsonl", [two_turns(1), {"prompt": 1}, two_turns(2) | {"domain": "talk"}])
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def run(folder: Path, world: World, *overrides: str) -> dict[str, Any]:
    config = load(folder / "recipe.toml", overrides)
    directory = RunDir(folder / "run")
    context: Any = SimpleNamespace(
        config=config,
        world=world,
        tokenizer=build_tokenizer(config.tokenizer),
        run=directory,
        stop=SimpleNamespace(agreed=lambda: False),
        attempt=1,
    )
    stage = with_paths(next(stage for stage in config.stage if stage.name == "mix"), directory)
    assert isinstance(stage, MixStage)
    return run_mix(stage, context)


def rows(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "run" / "mix" / "data.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_rows_counts_and_card(folder: Path, world: World) -> None:
    """Shares of 6 and 3, of which the second source has 2 rows."""
    found = run(folder, world)
    written = rows(folder)
    assert [sum(row["source"] == name for row in written) for name in ("reasoning", "chat.jsonl")] == [6, 2]
    assert {row["domain"] for row in written} == {"math", "general", "talk"}
    questions = [row["messages"][0]["content"] for row in written]
    assert len(set(questions)) == 8 and not any("7*" in question or question == "hm" for question in questions)

    card = json.loads((folder / "run" / "mix" / "card.json").read_text())
    tokens = sum(len(message["content"]) for row in written for message in row["messages"] if row["domain"] == "math")
    assert card["domains"]["math"] == {"samples": 6, "average_rounds": 1.0, "average_tokens": round(tokens / 6, 1)}
    assert card["domains"]["talk"] == {"samples": 1, "average_rounds": 2.0, "average_tokens": 6 + 2 + 4 + 2}
    assert (card["rows"], card["total"]["samples"], card["total"]["average_rounds"]) == (8, 8, 1.25)
    assert card["sources"] == [
        {"source": "reasoning", "rows": 13, "bad": 0, "duplicates": 1, "contaminated": 2, "left": 10}
        | {"share": 6, "given": 6},
        {"source": "chat.jsonl", "rows": 3, "bad": 1, "duplicates": 0, "contaminated": 0, "left": 2}
        | {"share": 3, "given": 2},
    ]
    # The second of the two rows shares words with both.
    assert card["contamination"] == {"reasoning": {"benchmark.sums": 2, "own.jsonl": 1}, "chat.jsonl": {}}
    readme = (folder / "run" / "mix" / "README.md").read_text(encoding="utf-8")
    assert "chat.jsonl: 2 rows of a share of 3" in readme and "Now 7*8=?" in readme
    assert str(folder) not in readme
    assert found == {
        "mix/rows": 8.0,
        "mix/tokens": pytest.approx(card["total"]["average_tokens"] * 8, abs=0.5),
        "mix/duplicates": 1.0,
        "mix/contaminated": 2.0,
        "mix/bad_rows": 1.0,
        "mix/missing": 1.0,
    }
    (line,) = read_metrics(folder / "run" / "mix" / "metrics.jsonl")
    assert line["mix/rows"] == 8


def test_the_same_bytes_again_and_after_a_kill(folder: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, world)
    mix = folder / "run" / "mix"
    files = ("data.jsonl", "README.md", "card.json")
    whole = {name: (mix / name).read_bytes() for name in files}
    for name in files:
        (mix / name).unlink()
    (mix / ".data.jsonl.tmp").write_text("half a row that a kill has left")
    run(folder, world)
    assert {name: (mix / name).read_bytes() for name in files} == whole
    assert sorted(path.name for path in mix.iterdir() if path.name.startswith(".")) == []
    run(folder, world, "seed=4")
    assert (mix / "data.jsonl").read_bytes() != whole["data.jsonl"]


def test_without_evaluations_and_caps(folder: Path, world: World) -> None:
    found = run(folder, world, "stage.mix.decontaminate.evaluations=false", "stage.mix.sources.1.cap=1")
    assert (found["mix/contaminated"], found["mix/missing"]) == (1.0, 2.0)
    assert sum(row["source"] == "chat.jsonl" for row in rows(folder)) == 1


def test_an_empty_mix_is_an_error_with_its_counts(folder: Path, world: World) -> None:
    jsonl(folder / "own.jsonl", [{"question": "+1=?"}, {"question": "tell"}])
    with pytest.raises(UserError, match=r"stage 'mix' has no row \(reasoning: 0 bad, 1 duplicates, 12 contaminated, 0"):
        run(folder, world)
    assert json.loads((folder / "run" / "mix" / "card.json").read_text())["rows"] == 0, "the card says more"


def test_solutions_count_too(folder: Path, world: World) -> None:
    """Of the own file in the column that the recipe names, and of benchmarks; short answers do not."""
    solution = "first add the two small ones then double what you have got"
    jsonl(folder / "own.jsonl", [{"question": "who are you?", "solution": solution, "answer": "ok"}])
    bench = [{"question": "7*8=?", "answer": "56"}, {"question": "7*9=?", "answer": f"since {solution[6:]} it is 63"}]
    jsonl(folder / "bench.jsonl", bench)
    jsonl(
        folder / "chat.jsonl", [{"prompt": "x", "response": solution}, two_turns(1), {"prompt": "y", "response": "9"}]
    )
    run(folder, world, "stage.mix.sources.1.max_bad_rows=0")
    card = json.loads((folder / "run" / "mix" / "card.json").read_text())
    assert card["contamination"]["chat.jsonl"] == {"benchmark.sums": 1}
    run(folder, world, "stage.mix.sources.1.max_bad_rows=0", 'stage.mix.decontaminate.answer_key="solution"')
    card = json.loads((folder / "run" / "mix" / "card.json").read_text())
    assert card["contamination"]["chat.jsonl"] == {"benchmark.sums": 1, "own.jsonl": 1}
    assert card["sources"][1]["left"] == 2


def test_it_runs_again_for_other_questions(folder: Path) -> None:
    """A mix reads what it is decontaminated against."""

    def inputs(*overrides: str) -> dict[str, str]:
        config = load(folder / "recipe.toml", overrides)
        return inputs_of(config, 2, {}, RunDir(folder / "run"))

    before = inputs()
    jsonl(folder / "bench.jsonl", [{"question": "7*8=?", "answer": "56"}, {"question": "7*7=?", "answer": "49"}])
    jsonl(folder / "own.jsonl", [{"question": "who?"}])
    after = inputs()
    assert {key for key in after if after[key] != before[key]} == {
        "benchmark.sums.prompts.path",
        "decontaminate.files.0",
    }
    fewer = inputs("benchmark.0.problems=1")
    assert {key for key in after if after[key] != fewer[key]} == {"benchmark.sums"}
    assert "benchmark.sums" not in inputs("stage.mix.decontaminate.evaluations=false")
