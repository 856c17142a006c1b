"""preferences -> reward_model (pairwise, pointwise) and mix through the command line: killed in each, same hashes."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.recipes import RECIPE, checkpoints, finish, lines, start, wait_until

pytestmark = pytest.mark.slow

ROWS = 6000  # of the mix, enough to be killed while it is written
PREFERENCES = """
[[stage]]
name = "prefs"
kind = "preferences"
from = "pretrain"
n = 4
chunk = 4
judge = { call = "judge.py:pair" }
sampling = { max_new_tokens = 24 }
[[stage.prompts]]
source = "generator"
task = "chain_sum"
options = { terms = 2 }
size = 16
seed = 3
template = "plain"
domain = "helpful"
"""
STAGES = """
[[stage]]
name = "labels"
kind = "preferences"
form = "labels"
sees = "response"
from = "pretrain"
n = 2
judge = { call = "judge.py:safe" }
sampling = { max_new_tokens = 24 }
prompts = { source = "generator", task = "chain_sum", options = { terms = 2 }, size = 12, template = "plain" }

[[stage]]
name = "helpful"
kind = "reward_model"
from = "pretrain"
steps = 2
batch = 4
max_length = 64
optimizer = { lr = 1e-3 }
pairs = { stage = "prefs" }

[[stage]]
name = "safety"
kind = "reward_model"
loss = "pointwise"
from = "pretrain"
steps = 8
batch = 6
max_length = 64
optimizer = { lr = 5e-3 }
checkpoint = { every = 4, keep = 3 }
labels = { stage = "labels" }
heldout_labels = { path = "heldout.jsonl" }

[[stage]]
name = "mix"
kind = "mix"
decontaminate = { files = ["own.jsonl"] }
[[stage.sources]]
path = "chat.jsonl"
[[stage.sources]]
path = "chat.jsonl"
"""
JUDGE = """
def pair(question, a, b):
    score = [sum(map(ord, text)) % 7 for text in (a, b)]
    return 3 if score[0] > score[1] else -3 if score[1] > score[0] else 0

def safe(question, answer):
    return len(answer) % 2 == 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    pretrain = "\n[[stage]]\n".join(RECIPE.split("\n[[stage]]\n")[:2])
    (root / "recipe.toml").write_text(pretrain + PREFERENCES + STAGES, encoding="utf-8")
    (root / "judge.py").write_text(JUDGE, encoding="utf-8")
    held = [{"prompt": "1+1=?", "response": "2" * (1 + i), "label": i % 2} for i in range(4)]
    chat = [{"prompt": f"tell {i}", "response": f"it is {i}"} for i in range(ROWS)]
    for name, rows in {"heldout": held, "chat": chat, "own": [{"question": "tell 77"}]}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    process = finish("run", folder / "recipe.toml", "--run-dir", folder / "whole")
    assert process.returncode == 0, process.stderr
    return folder / "whole"


def rows(run: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / stage / "data.jsonl").read_text(encoding="utf-8").splitlines()]


def outputs(run: Path) -> dict[str, Any]:
    return {stage["name"]: stage["outputs"] for stage in json.loads((run / "stages.json").read_text())["stages"]}


def test_pairs_and_labels_are_the_judges(whole: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(JUDGE, namespace)
    pairs, labels = rows(whole, "prefs"), rows(whole, "labels")
    assert len(pairs) >= 4 and all(namespace["pair"]("", row["chosen"], row["rejected"]) == 3 for row in pairs)
    assert all("<think>" not in row["chosen"] and "<answer>" not in row["chosen"] for row in pairs)
    assert {row["label"] for row in labels} == {0, 1}
    assert all(row["label"] == namespace["safe"]("", row["response"]) for row in labels)
    card = json.loads((whole / "prefs" / "card.json").read_text())
    assert card["candidates"] == 32 == len(pairs) + sum(card["dropped"].values())
    assert card["prompts"] == 16 and card["rows"] == len(pairs)


def test_both_reward_models_learn_from_them(whole: Path) -> None:
    assert lines(whole / "helpful")[0]["loss/pairwise"] == pytest.approx(0.693147, rel=1e-5)
    safety = lines(whole / "safety")
    assert safety[0]["loss/pointwise"] == pytest.approx(0.693147, rel=1e-5)
    assert (safety[0]["reward_model/accuracy"], safety[0]["reward_model/good"]) == (0.5, 0)
    last = safety[-1]
    assert last["loss/pointwise"] < 0.69 and last["reward_model/good"] != last["reward_model/bad"]
    assert 0 <= last["reward_model/heldout_accuracy"] <= 1 and last["reward_model/heldout_loss"] > 0


def test_the_mix_has_every_other_row_once(whole: Path) -> None:
    """Its second source is the first again."""
    mixed = rows(whole, "mix")
    card = json.loads((whole / "mix" / "card.json").read_text())
    assert Counter(row["messages"][0]["content"] for row in mixed) == Counter(
        f"tell {i}" for i in range(ROWS) if i != 77
    )
    assert [source["duplicates"] for source in card["sources"]] == [0, ROWS]
    assert [source["contaminated"] for source in card["sources"]] == [1, 0]


def test_killed_in_each_stage_it_comes_to_the_same_hashes(whole: Path, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    points: dict[str, Callable[[], bool]] = {
        "the second chunk": lambda: (run / "prefs" / "chunks" / "000001.jsonl").exists(),
        "the first checkpoint": lambda: bool(checkpoints(run, "safety")),
        "rows of the mix": lambda: (run / "mix" / ".data.jsonl.tmp").exists(),
    }
    for name, reached in points.items():
        process = start("run", folder / "recipe.toml", "--run-dir", run, output=tmp_path / "log")
        wait_until(reached, process, name)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (run / "mix" / "data.jsonl").exists()
    last = finish("run", folder / "recipe.toml", "--run-dir", run)
    assert last.returncode == 0, last.stderr
    assert outputs(run) == outputs(whole)
    for name in ("prefs", "labels", "mix"):
        for file in ("README.md", "card.json"):
            assert (run / name / file).read_bytes() == (whole / name / file).read_bytes()


def test_two_ranks_write_the_same_rows(whole: Path, folder: Path) -> None:
    header = RECIPE.split("\n[[stage]]\n")[0]
    stage = PREFERENCES.replace('"pretrain"', json.dumps(str(whole / "pretrain")))
    mix = STAGES[STAGES.index('\n[[stage]]\nname = "mix"') :]
    recipe = folder / "two.toml"
    recipe.write_text(f"{header}\n[parallel]\ndata = 2\n{stage}{mix}", encoding="utf-8")
    process = finish("run", recipe, "--run-dir", folder / "two")
    assert process.returncode == 0, process.stderr
    for name in ("prefs", "mix"):
        assert (folder / "two" / name / "data.jsonl").read_bytes() == (whole / name / "data.jsonl").read_bytes()
