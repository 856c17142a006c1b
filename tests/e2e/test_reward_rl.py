"""R1's second RL stage through the command line: reasoning prompts by rule, general ones by a reward model, which
scores in the process or behind `megatron-r1 serve`; a killed run goes on to the same bits.

The reward model is trained in the same recipe. General prompts and its reward take part in the last 4 of 6 steps, i.e.
from the second phase (steps 2, 3) on; the checkpoint of step 3 lies in the middle of that phase.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.cluster.local import free_port
from megatron_r1.config.errors import RunFailed
from megatron_r1.rewards.reward_client import Item, RewardClient
from tests.e2e.recipes import (
    RECIPE,
    checkpoints,
    finish,
    lines,
    living,
    loop_state,
    rollouts,
    start,
    tensors,
    wait_until,
)
from tests.e2e.test_reward_model import STAGE, write_pairs

pytestmark = pytest.mark.slow

STEPS, EVERY, LAST = 6, 3, 4
RL2 = f"""
[[stage]]
name = "rl2"
kind = "grpo"
from = "pretrain"
steps = {STEPS}
optimizer = {{ lr = 3e-3, warmup_steps = 1 }}
checkpoint = {{ every = {EVERY}, keep = 3 }}
sampling = {{ temperature = 1.3, max_new_tokens = 10 }}
watch = {{ window = 2 }}
grpo = {{ prompts = 4, group_size = 4, minibatches = 2 }}

[[stage.prompts]]
source = "generator"
task = "chain_sum"
options = {{ terms = 2 }}
template = "plain"

[[stage.prompts]]
source = "jsonl"
path = "general.jsonl"
verifier = "none"
template = "plain"
domain = "general"
last_steps = {LAST}

[[stage.reward]]
kind = "accuracy"
domains = ["reasoning"]

[[stage.reward]]
kind = "format"
weight = 0.5

[[stage.reward]]
kind = "model"
name = "helpful"
from = "helpful"
sees = "summary"
transform = "sigmoid"
weight = 0.25
domains = ["general"]
last_steps = {LAST}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rl2")
    pretrain = RECIPE.split("\n[[stage]]\n")[:2]
    helpful = STAGE.replace("steps = 40", "steps = 8").replace("every = 15", "every = 8")
    text = "\n[[stage]]\n".join(pretrain) + helpful + RL2
    for name in ("pairs", "heldout", "general"):
        text = text.replace(f"{name}.jsonl", str(folder / f"{name}.jsonl"))
    write_pairs(folder / "pairs.jsonl", 30, seed=1)
    write_pairs(folder / "heldout.jsonl", 8, seed=2)
    rows = [{"question": f"{a}+{a + 1}=?", "answer": None} for a in range(10, 30)]
    (folder / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    run = recipe.parent / "whole"
    process = finish("run", recipe, "--run-dir", run)
    assert process.returncode == 0, process.stderr
    return run


def timeless(run: Path) -> list[dict[str, Any]]:
    rows = lines(run / "rl2")
    return [{k: v for k, v in row.items() if not k.startswith("time") and "per_second" not in k} for row in rows]


def test_general_prompts_and_their_reward_come_in_the_last_steps(whole: Path) -> None:
    first, second, third = (row for row in timeless(whole) if "rollout/tokens" in row)
    assert not [name for name in first if "helpful" in name or "hacking" in name or "general" in name]
    for row in (second, third):
        assert (row["groups/prompts/general"], row["groups/prompts/reasoning"]) == (2, 2)
        assert row["reward/model_std/helpful"] > 0 and row["reward/model_cut/helpful"] == 0
        assert row["reward/hacking_watch"] in (0, 1)
    assert (whole / "rl2" / "reward-hacking.svg").read_text().count("<svg") == 3
    assert "reward-hacking" in finish("report", whole).stdout or (whole / "report.html").exists()
    page = (whole / "report.html").read_text()
    assert "Mean value of reward models" in page and "Reward-hacking watch" in page


def test_every_completion_has_all_parts_and_the_right_ones(whole: Path) -> None:
    files = rollouts(whole, "rl2")
    assert list(files) == [f"step-{step:06d}.jsonl.gz" for step in (0, 2, 4)]
    general = 0
    for name, rows in files.items():
        for row in rows:
            parts = row["reward_parts"]
            assert set(parts) == {"accuracy", "format", "helpful"}
            assert sum(parts.values()) == row["reward"]
            if row["prompt_id"].startswith("general"):
                general += 1
                assert name != "step-000000.jsonl.gz"
                assert parts["accuracy"] == 0 < parts["helpful"] < 0.25 and row["verdict"] == "unknown"
            else:
                assert parts["helpful"] == 0
    assert general == 2 * 2 * 4


def test_a_killed_run_goes_on_to_the_same_bits(whole: Path, recipe: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "killed", tmp_path / "killed.log"
    process = start("run", recipe, "--run-dir", run, output=output)
    wait_until(lambda: (run / "rl2" / "rollouts" / "step-000004.jsonl.gz").exists(), process, "the third phase")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    newest = checkpoints(run, "rl2")[-1]
    assert newest == f"step-{EVERY:08d}"
    assert loop_state(run / "rl2" / "checkpoints" / newest)["phase"]["taken"] == 1
    last = finish("run", recipe, "--run-dir", run)
    assert last.returncode == 0, last.stderr
    assert timeless(run) == timeless(whole)
    assert rollouts(run, "rl2") == rollouts(whole, "rl2")
    check_same_weights(run, whole)


def check_same_weights(run: Path, whole: Path) -> None:
    one, other = (tensors(each / "rl2" / "checkpoints" / f"step-{STEPS:08d}") for each in (run, whole))
    assert one.keys() == other.keys()
    assert not [key for key in one if not torch.equal(one[key], other[key])]


@contextmanager
def serving(run: Path, output: Path, *overrides: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port = free_port()
    process = start("serve", run, "helpful", "--port", str(port), *overrides, output=output)
    try:
        wait_until(lambda: "at http://" in output.read_text(), process, "the server")
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def server(whole: Path, tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with serving(whole, tmp_path / "serve.log") as found:
        yield found


def test_two_ranks_serve_and_end_together(
    whole: Path, tmp_path: Path, server: tuple[str, subprocess.Popen[bytes]]
) -> None:
    items = [Item("1+1=?", "2" * n) for n in range(1, 30)]
    expected, cut = RewardClient("helpful", server[0], 60).score(items)
    assert len({round(value, 5) for value in expected}) > 20 and cut == 0
    with serving(whole, tmp_path / "two.log", "parallel.tensor=2", "parallel.data=1") as (url, process):
        assert RewardClient("helpful", url, 60).score(items)[0] == pytest.approx(expected, abs=1e-5)
        with pytest.raises(RunFailed, match=r"400.*items\[0\]: the char tokenizer has no token for 'ß'"):
            RewardClient("helpful", url, 60).score([Item("ß", "")])
        assert len(living(process.pid)) == 3, "the launcher and two ranks"
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert living(process.pid) == [] and "Traceback" not in (tmp_path / "two.log").read_text()


def test_a_server_gives_the_same_run(
    whole: Path, recipe: Path, tmp_path: Path, server: tuple[str, subprocess.Popen[bytes]]
) -> None:
    """The same values to the bit, so the same rewards, gradients and weights."""
    url, process = server
    with urllib.request.urlopen(f"{url}/health") as answer:
        health = json.load(answer)
    assert (health["status"], health["stage"]) == ("ok", "helpful") and health["checkpoint"].endswith("step-00000008")
    text = recipe.read_text()
    served, number = re.subn(r'from = "helpful"\n', f'url = "{url}"\n', text)
    assert number == 1
    (tmp_path / "served.toml").write_text(served)
    run = tmp_path / "served"
    finished = finish("run", tmp_path / "served.toml", "--run-dir", run)
    assert finished.returncode == 0, finished.stderr
    assert rollouts(run, "rl2") == rollouts(whole, "rl2")
    assert timeless(run) == timeless(whole)
    check_same_weights(run, whole)

    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    log = (tmp_path / "serve.log").read_text()
    assert "Traceback" not in log and "killed" not in log


def test_a_server_that_is_down_ends_the_run_and_nothing_is_lost(whole: Path, recipe: Path, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    text = recipe.read_text().replace('from = "helpful"\n', f'url = "{url}"\ntimeout = 0.5\n')
    (tmp_path / "down.toml").write_text(text)
    run = tmp_path / "down"
    failed = finish("run", tmp_path / "down.toml", "--run-dir", run)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert f"the reward model 'helpful' at {url} gave no values within timeout = 0.5 s" in failed.stderr
    mended = finish("run", recipe, "--run-dir", run)
    assert mended.returncode == 0, mended.stderr
    assert rollouts(run, "rl2") == rollouts(whole, "rl2")
    check_same_weights(run, whole)
