"""pretrain -> sft -> eval through the command line: it learns to answer, its first loss is transformers' masked
cross-entropy, a killed run goes on to the same bits.
"""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_r1.config.model import TokenizerConfig
from megatron_r1.data.cursor import epoch_order
from megatron_r1.data.tokenizers import build_tokenizer
from tests.e2e.recipes import RECIPE, checkpoints, finish, lines, loop_state, start, steps, tensors, wait_until

ROWS, BATCH, EPOCHS, EVERY = 120, 24, 30, 60
STEPS = 155  # ceil(124 x 30 / 24): the rows, one that is held out, two with the eval's question, one too long
PROMPTS = 'prompts = { source = "jsonl", path = "eval.jsonl", template = "plain" }\nsampling = { max_new_tokens = 16 }'
STAGES = f"""
[[stage]]
name = "hf"
kind = "export"
dtype = "fp32"

[[stage]]
name = "before"
kind = "eval"
from = "pretrain"
problems = 10
k = 2
{PROMPTS}

[[stage]]
name = "cold"
kind = "sft"
from = "pretrain"
epochs = {EPOCHS}
batch = {BATCH}
format = "r1"
template = "plain"
max_length = 60
optimizer = {{ lr = 1e-2, warmup_steps = 5 }}
checkpoint = {{ every = {EVERY}, keep = 3 }}
data = {{ source = "jsonl", path = "chat.jsonl", max_bad_rows = 1 }}
heldout = {{ source = "jsonl", path = "heldout.jsonl" }}

[[stage]]
name = "after"
kind = "eval"
problems = 10
k = 2
{PROMPTS}
"""


def conversation(*numbers: int) -> dict[str, Any]:
    """One turn for each number, thought and answered: the number again."""
    messages = []
    for number in numbers:
        answer = {"role": "assistant", "content": str(number), "reasoning_content": str(number)}
        messages += [{"role": "user", "content": f"{number}?"}, answer]
    return {"messages": messages}


def write_data(folder: Path) -> None:
    numbers = list(range(10, 100))
    draw = random.Random(3)
    draw.shuffle(numbers)
    known, asked, held = numbers[:60], numbers[60:70], numbers[70:]
    rows = [conversation(*draw.sample(known, 2 if i % 3 == 0 else 1)) for i in range(ROWS)]
    rows += [conversation(asked[0], known[0]), conversation(asked[1]), conversation(held[3])]
    rows.append({"prompt": "1?", "response": "1" * 70})
    texts = [json.dumps(row) for row in rows]
    texts.insert(5, '{"messages": [')
    (folder / "chat.jsonl").write_text("\n".join(texts) + "\n")
    (folder / "heldout.jsonl").write_text("".join(json.dumps(conversation(n)) + "\n" for n in held))
    evaluated = [{"question": f"{n}?", "answer": str(n)} for n in asked]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluated))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    write_data(folder)
    pretrain = "\n[[stage]]\n".join(RECIPE.split("\n[[stage]]\n")[:2]).replace("steps = 60", "steps = 6")
    path = folder / "recipe.toml"
    path.write_text(pretrain + STAGES, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    run = recipe.parent / "whole"
    process = finish("run", recipe, "--run-dir", run)
    assert process.returncode == 0, process.stderr
    log = process.stdout + process.stderr
    assert f"124 conversations: 30.00 epochs in {STEPS} steps" in log
    assert "chat.jsonl:6: not valid JSON" in log
    return run


def timeless(run: Path) -> list[dict[str, Any]]:
    rows = lines(run / "cold")
    return [{k: v for k, v in row.items() if not k.startswith("time") and "per_second" not in k} for row in rows]


def test_it_learns_to_answer(whole: Path) -> None:
    rows = lines(whole / "cold")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["loss/lm"] > 3 and rows[-1]["loss/lm"] < 0.2
    assert rows[-1]["loss/heldout"] < 0.4 and all("loss/heldout" not in row for row in rows[:-1])
    assert "loss/mtp" in rows[-1]
    states = {state["name"]: state for state in json.loads((whole / "stages.json").read_text())["stages"]}
    before, after = (states[name]["result"] for name in ("before", "after"))
    assert before["eval/pass_at_1"] == before["eval/format"] == 0
    assert after["eval/pass_at_1"] >= 0.7 and after["eval/format"] == 1  # of numbers that were never trained on
    assert states["cold"]["steps"] == states["cold"]["steps_done"] == STEPS
    assert states["cold"]["result"]["loss/heldout"] == rows[-1]["loss/heldout"]


def test_learning_rate_and_counts(whole: Path) -> None:
    rows = lines(whole / "cold")
    # Warm-up from 0; the last step is one before the end of the cosine, whose floor is a tenth by default.
    assert rows[0]["optim/lr"] == 0 and rows[5]["optim/lr"] == pytest.approx(1e-2)
    assert rows[-1]["optim/lr"] == pytest.approx(1e-3, rel=2e-2) and rows[-1]["optim/lr"] > 1e-3
    last = rows[-1]
    # 155 x 24 conversations are 31 passes over the 120 that are trained on.
    assert last["data/epoch"] == pytest.approx(31, abs=0.05)
    assert 30 * 3 <= last["data/held_out_skips"] <= 31 * 3 and last["data/too_long"] in (30, 31)
    assert (last["data/bad_rows"], last["data/truncated"]) == (1, 0)
    # A turn: 3 characters of the question, 2 + 2 of thought and answer, 4 tags, the end.
    assert all(row["train/learned_share"] == pytest.approx(9 / 12) for row in rows)


def test_the_first_loss_is_the_masked_cross_entropy_of_transformers(whole: Path, recipe: Path) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(kind="char"))
    texts = [text for text in (recipe.parent / "chat.jsonl").read_text().splitlines() if text != '{"messages": [']
    first = [i for i in epoch_order(len(texts), 1, 0) if i < ROWS][:BATCH]
    model = AutoModelForCausalLM.from_pretrained(whole / "hf" / "hf")
    total, count = 0.0, 0
    for index in first:
        ids: list[int] = []
        labels: list[int] = []
        for message in json.loads(texts[index])["messages"]:
            piece = tokenizer.encode(message["content"])
            if message["role"] == "assistant":
                said = f"<think>{message['reasoning_content']}</think><answer>{message['content']}</answer>"
                piece = [*tokenizer.encode(said), tokenizer.eos_id]
            ids += piece
            labels += piece if message["role"] == "assistant" else [-100] * len(piece)
        learned = sum(label != -100 for label in labels)
        with torch.no_grad():
            total += learned * float(model(torch.tensor([ids]), labels=torch.tensor([labels])).loss)
        count += learned
    row = lines(whole / "cold")[0]
    assert row["loss/lm"] == pytest.approx(total / count, rel=1e-5)
    assert count / row["train/tokens"] == row["train/learned_share"]


def test_a_killed_run_goes_on_to_the_same_bits(whole: Path, recipe: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "killed", tmp_path / "killed.log"
    process = start("run", recipe, "--run-dir", run, output=output)
    wait_until(lambda: any(step > EVERY + 2 for step in steps(run / "cold")), process, "steps after a checkpoint")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoints(run, "cold") == [f"step-{EVERY:08d}"]
    assert loop_state(run / "cold" / "checkpoints" / f"step-{EVERY:08d}")["batches"]["cursor"]["position"] > 0
    last = finish("run", recipe, "--run-dir", run)
    assert last.returncode == 0, last.stderr
    assert "goes on from" in last.stdout + last.stderr
    assert timeless(run) == timeless(whole)
    name = f"step-{STEPS:08d}"
    one, other = (tensors(folder / "cold" / "checkpoints" / name) for folder in (whole, run))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_plan_and_the_report_know_the_stage(whole: Path, recipe: Path) -> None:
    plan = finish("run", recipe, "--dry-run", "--run-dir", whole)
    assert plan.returncode == 0, plan.stderr
    assert f"# stage cold: 30 epochs in {STEPS} steps" in plan.stdout
    assert "stage.cold.epochs: 30 (paper: 2 to 3;" in plan.stdout
    report = finish("report", whole)
    assert report.returncode == 0, report.stderr
    page = (whole / "report.html").read_text()
    assert "Tokens that are learned" in page and "Held-out loss" not in page
