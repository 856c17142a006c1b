"""pretrain -> reward_model through the command line: it learns a preference; a killed run goes on to the same bits."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.recipes import RECIPE, checkpoints, finish, lines, loop_state, start, steps, tensors, wait_until

STEPS, EVERY = 40, 15
STAGE = """
[[stage]]
name = "helpful"
kind = "reward_model"
steps = 40
batch = 8
max_length = 32
optimizer = { lr = 5e-3, warmup_steps = 2 }
checkpoint = { every = 15, keep = 3 }
pairs = { source = "jsonl", path = "pairs.jsonl" }
heldout = { source = "jsonl", path = "heldout.jsonl" }
"""


def write_pairs(path: Path, number: int, seed: int) -> set[str]:
    """Chosen answers are sums with a dot, rejected ones the same with a question mark; returns the prompts."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        a, b = draw.randint(0, 99), draw.randint(0, 99)
        rows.append({"prompt": f"{a}+{b}=?", "chosen": f"{a + b}.", "rejected": f"{a + b}?"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {row["prompt"] for row in rows}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    pretrain = RECIPE.split("\n[[stage]]\n")[:2]
    text = "\n[[stage]]\n".join(pretrain).replace("steps = 60", "steps = 6") + STAGE
    for name in ("pairs", "heldout"):
        text = text.replace(f"{name}.jsonl", str(folder / f"{name}.jsonl"))
    write_pairs(folder / "pairs.jsonl", 60, seed=1)
    held = write_pairs(folder / "heldout.jsonl", 20, seed=2)
    with (folder / "pairs.jsonl").open("a") as file:  # one that is held out, one that is too long
        file.write(json.dumps({"prompt": sorted(held)[0], "chosen": "1.", "rejected": "1?"}) + "\n")
        file.write(json.dumps({"prompt": "1+1=?", "chosen": "2" * 40, "rejected": "3"}) + "\n")
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    run = recipe.parent / "whole"
    process = finish("run", recipe, "--run-dir", run)
    assert process.returncode == 0, process.stderr
    assert "62 pairs: 5.16 epochs in 40 steps" in process.stdout + process.stderr
    assert re.search(r"holds a language model: the scalar head .* is new", process.stdout + process.stderr)
    return run


def timeless(run: Path) -> list[dict[str, Any]]:
    rows = lines(run / "helpful")
    return [{k: v for k, v in row.items() if not k.startswith("time") and "per_second" not in k} for row in rows]


def test_it_learns_the_preference(whole: Path) -> None:
    rows = lines(whole / "helpful")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["loss/pairwise"] == pytest.approx(math.log(2), rel=1e-6)
    assert (rows[0]["reward_model/accuracy"], rows[0]["reward_model/margin"]) == (0.5, 0)
    last = rows[-1]
    assert last["reward_model/accuracy"] > 0.9
    assert last["reward_model/heldout_accuracy"] > 0.9
    assert last["loss/pairwise"] < 0.2 and last["reward_model/heldout_loss"] < 0.2
    assert last["reward_model/margin"] == pytest.approx(last["reward_model/chosen"] - last["reward_model/rejected"])
    # Five epochs of which each leaves out one pair for either reason, and the beginning of a sixth.
    assert last["data/held_out_skips"] in (5, 6) and last["data/too_long"] in (5, 6)
    result = json.loads((whole / "stages.json").read_text())["stages"][1]["result"]
    assert result["reward_model/heldout_accuracy"] == last["reward_model/heldout_accuracy"]


def test_a_killed_run_goes_on_to_the_same_bits(whole: Path, recipe: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "killed", tmp_path / "killed.log"
    process = start("run", recipe, "--run-dir", run, output=output)
    wait_until(
        lambda: any(step > EVERY + 2 for step in steps(run / "helpful")), process, "the second checkpoint's steps"
    )
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoints(run, "helpful") == [f"step-{EVERY:08d}"]
    assert loop_state(run / "helpful" / "checkpoints" / f"step-{EVERY:08d}")["pairs"]["cursor"]["position"] > 0
    last = finish("run", recipe, "--run-dir", run)
    assert last.returncode == 0, last.stderr
    assert "goes on from" in last.stdout + last.stderr
    assert timeless(run) == timeless(whole)
    name = f"step-{STEPS:08d}"
    one, other = (tensors(folder / "helpful" / "checkpoints" / name) for folder in (whole, run))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert one["scalar_head.weight"].any()
