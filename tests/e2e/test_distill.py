"""A teacher, a student of another architecture, on-policy distillation through the command line: the student moves to
its teacher; a killed run goes on to the same bits; a teacher that does not fit is refused before anything runs.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.recipes import (
    RECIPE,
    checkpoints,
    finish,
    lines,
    loop_state,
    rollouts,
    start,
    steps,
    tensors,
    wait_until,
)

STEPS, EVERY, QUESTIONS, N = 80, 20, 16, 4
BEFORE, _, _ = RECIPE.partition('[[stage]]\nname = "eval-base"')
STUDENT = """
[models.student]
preset = "tiny-dense"

[models.student.override]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
max_position_embeddings = 128

[tokenizer]
"""
STAGES = f"""
[[stage]]
name = "base"
kind = "pretrain"
model = "student"
steps = 40
batch_tokens = 512
optimizer = {{ lr = 1e-2 }}

[[stage.corpus]]
options = {{ terms = 2 }}
styles = {{ plain = 0.7, direct = 0.3 }}

[[stage]]
name = "on-policy"
kind = "distill"
model = "student"
from = "base"
teacher = "pretrain"
steps = {STEPS}
questions = {QUESTIONS}
n = {N}
optimizer = {{ lr = 5e-3, schedule = "linear" }}
checkpoint = {{ every = {EVERY}, keep = 3 }}
sampling = {{ max_new_tokens = 10 }}

[[stage.prompts]]
source = "generator"
task = "chain_sum"
options = {{ terms = 2 }}
template = "plain"
weight = 3.0

[[stage.prompts]]
source = "jsonl"
path = "open.jsonl"
verifier = "none"
template = "plain"
domain = "open"
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    rows = [json.dumps({"question": f"{i}+{i}=?", "answer": ""}) for i in range(6)]
    (folder / "open.jsonl").write_text("\n".join(rows), encoding="utf-8")
    path = folder / "recipe.toml"
    path.write_text(BEFORE.replace("[tokenizer]\n", STUDENT) + STAGES, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    run = recipe.parent / "whole"
    process = finish("run", recipe, "--run-dir", run)
    assert process.returncode == 0, process.stderr
    return run


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


@pytest.mark.slow
def test_the_student_moves_to_its_teacher(whole: Path) -> None:
    rows = lines(whole / "on-policy")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    first, last = rows[:3], rows[-5:]
    for name in ("distill/reverse_kl", "distill/reverse_kl_k3", "loss/total"):
        assert mean(last, name) < mean(first, name) / 10, name
    assert all(row["rollout/completions"] == QUESTIONS * N for row in rows)
    # The engine's log-probs are the student's: the same weights.
    assert max(row["policy/engine_gap"] for row in rows) < 1e-5
    state = next(s for s in json.loads((whole / "stages.json").read_text())["stages"] if s["name"] == "on-policy")
    assert state["result"]["distill/reverse_kl"] == rows[-1]["distill/reverse_kl"]


@pytest.mark.slow
def test_what_is_written_of_the_samples(whole: Path) -> None:
    """The teacher's opinion of each completion adds up to the step's reverse KL; open prompts are not judged."""
    written = rollouts(whole, "on-policy")
    assert len(written) == STEPS
    rows = written["step-000000.jsonl.gz"]
    assert len(rows) == QUESTIONS * N
    divergence = -sum(row["advantage"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    assert divergence == pytest.approx(lines(whole / "on-policy")[0]["distill/reverse_kl"], rel=1e-3)
    unjudged = [row for row in rows if row["verdict_detail"] == "no accuracy reward"]
    assert len(unjudged) == QUESTIONS * N / 4


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(recipe: Path, whole: Path) -> None:
    run, output = recipe.parent / "killed", recipe.parent / "killed.log"
    process = start("run", recipe, "--run-dir", run, output=output)
    wait_until(lambda: any(step > EVERY + 2 for step in steps(run / "on-policy")), process, "step 23")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert f"step-{STEPS:08d}" not in checkpoints(run, "on-policy"), "killed too late"
    again = finish("run", recipe, "--run-dir", run)
    assert again.returncode == 0, again.stderr
    assert "stage on-policy goes on from" in again.stdout + again.stderr
    last = f"step-{STEPS:08d}"
    expected, found = (tensors(folder / "on-policy" / "checkpoints" / last) for folder in (whole, run))
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert loop_state(whole / "on-policy/checkpoints" / last) == loop_state(run / "on-policy/checkpoints" / last)
    assert rollouts(whole, "on-policy") == rollouts(run, "on-policy")
    assert timeless(whole) == timeless(run)


def timeless(run: Path) -> list[dict[str, Any]]:
    rows = lines(run / "on-policy")
    return [{k: v for k, v in row.items() if not k.startswith("time") and "per_second" not in k} for row in rows]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "models.student.override.max_position_embeddings=256",
            "max_position_embeddings is 128, below the student's 256",
        ),
        ("models.student.override.vocab_size=200", "vocab_size is 102, below the student's 200"),
        ("stage.on-policy.teacher=base", "[model] are wanted, and that stage trains [models.student]"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(recipe: Path, override: str, message: str) -> None:
    process = finish("run", recipe, override, "--dry-run")
    assert process.returncode == 2 and message in process.stderr, process.stderr


def test_replicas_share_the_questions(recipe: Path) -> None:
    process = finish("run", recipe, "stage.on-policy.questions=9", "--nproc", "2", "--dry-run")
    assert process.returncode == 2
    assert "stage.on-policy.questions = 9 does not divide over 2" in process.stderr
