"""pretrain -> sample -> sft through the command line: kills in the middle, a judge that goes away, two replicas."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.recipes import RECIPE, finish, lines, start, wait_until
from tests.unit.judges.server import JudgeServer, Reply

pytestmark = pytest.mark.slow
CHUNKS, CHUNK = 6, 8
PROMPTS = 'source = "generator", task = "chain_sum", options = { terms = 2 }, template = "plain"'
COLD = f"""
[[stage]]
name = "cold"
kind = "sample"
n = 4
chunk = {CHUNK}
keep = 2
filter = {{ thought = 0 }}
sampling = {{ max_new_tokens = 30, temperature = 0.7 }}

[[stage.prompts]]
{PROMPTS.replace(", ", chr(10), 2).replace(", template", chr(10) + "template")}
size = 24

[[stage.prompts]]
{PROMPTS.replace(", ", chr(10), 2).replace(", template", chr(10) + "template")}
seed = 7
size = 24
domain = "free"
verifier = "VERIFIER"
"""
TAIL = f"""
[[stage]]
name = "tune"
kind = "sft"
from = "pretrain"
steps = 2
batch = 2
format = "r1"
template = "plain"
data = {{ stage = "cold" }}

[[stage]]
name = "test"
kind = "eval"
problems = 4
k = 1
prompts = {{ {PROMPTS}, size = 4, seed = 7 }}
sampling = {{ max_new_tokens = 4 }}
"""
PRETRAIN = "\n[[stage]]\n".join(RECIPE.split("\n[[stage]]\n")[:2]).replace("direct = 0.6, plain = 0.4", "direct = 1.0")


def recipe(folder: Path, verifier: str, judge: str = "", tail: str = TAIL) -> Path:
    path = folder / "recipe.toml"
    path.write_text(PRETRAIN + COLD.replace("VERIFIER", verifier) + judge + tail, encoding="utf-8")
    return path


class Run:
    """A finished run and its recipe."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.recipe, self.folder = path, folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("sample")
    path = recipe(folder, "none")
    process = finish("run", path, "--run-dir", folder / "run")
    assert process.returncode == 0, process.stderr
    return Run(path, folder / "run")


def made(run: Path) -> dict[str, bytes]:
    """What the stage leaves to others."""
    return {name: (run / "cold" / name).read_bytes() for name in ("data.jsonl", "README.md", "card.json")}


def timeless(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in lines(run / "cold")]


def only_pretrained(whole: Run, run: Path) -> None:
    """A run that has done its pretraining, as the whole one did it, and nothing else."""
    run.mkdir()
    shutil.copytree(whole.folder / "pretrain", run / "pretrain")
    states = json.loads((whole.folder / "stages.json").read_text())["stages"]
    (run / "stages.json").write_text(json.dumps({"stages": states[:1]}))


def chunk_file(run: Path, number: int) -> Path:
    return run / "cold" / "chunks" / f"{number:06d}.jsonl"


def test_the_data_and_its_card(whole: Run) -> None:
    rows = [json.loads(line) for line in (whole.folder / "cold" / "data.jsonl").read_text().splitlines()]
    card = json.loads((whole.folder / "cold" / "card.json").read_text())
    free = card["domains"]["free"]
    # Of the second source's prompts 4 are the evaluation's.
    assert card["held_out_prompts"] >= 4 and card["prompts"] + card["held_out_prompts"] == CHUNKS * CHUNK
    assert free["samples"] == 4 * free["prompts"] == free["rows"] + sum(free["dropped"].values())
    assert "wrong" not in free["dropped"] and card["domains"]["reasoning"]["dropped"]["wrong"] > 0
    assert len(rows) == card["rows"] > 20 and card["weights"].startswith("pretrain/checkpoints/step-")
    for row in rows:
        question, answer = row["messages"]
        if row["domain"] == "reasoning":  # checked without the project: "3+4=?" or "3-4=?"
            assert eval(question["content"].removesuffix("=?")) == int(answer["content"])
    state = {s["name"]: s for s in json.loads((whole.folder / "stages.json").read_text())["stages"]}
    assert (state["cold"]["steps"], state["cold"]["steps_done"]) == (CHUNKS, CHUNKS)
    assert state["cold"]["result"]["sample/rows"] == len(rows)
    assert [row["step"] for row in lines(whole.folder / "cold")] == list(range(1, CHUNKS + 1))
    assert state["tune"]["state"] == state["test"]["state"] == "done"


def test_kills_leave_no_trace(whole: Run, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "run.log"
    only_pretrained(whole, run)
    moments: list[tuple[str, Callable[[], bool]]] = [
        ("the first chunk", chunk_file(run, 0).exists),
        ("samples of the fourth chunk", (run / "cold" / "rollouts" / "step-000003.jsonl.gz").exists),
    ]
    for what, moment in moments:
        process = start("run", whole.recipe, "--run-dir", run, output=output)
        wait_until(moment, process, what)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (run / "cold" / "data.jsonl").exists(), "killed too late"
    before = chunk_file(run, 0).stat().st_mtime_ns
    last = finish("run", whole.recipe, "--run-dir", run)
    assert last.returncode == 0, last.stderr
    assert "goes on after" in last.stdout + last.stderr
    assert made(run) == made(whole.folder)
    assert timeless(run) == timeless(whole.folder)
    assert chunk_file(run, 0).stat().st_mtime_ns == before  # a finished chunk is not done again


def judging(request: dict[str, Any], number: int) -> Reply:
    """Correct if the answer is even."""
    text = request["messages"][0]["content"]
    answer = text.partition("[Student's answer]\n")[2].partition("\n")[0]
    return Reply(json.dumps({"analysis": "so", "correctness": "correct" if answer[-1] in "02468" else "incorrect"}))


JUDGE = '\n[stage.judge.server]\nurl = "{url}"\nmodel = "judge-1"\nretries = 0\nconcurrency = 2\n'


def test_a_judge_that_goes_away_costs_nothing(whole: Run, tmp_path: Path) -> None:
    run, never = tmp_path / "run", tmp_path / "never"
    for folder in (run, never):
        only_pretrained(whole, folder)
    healthy = True

    def until_it_fails(request: dict[str, Any], number: int) -> Reply:
        return judging(request, number) if healthy or number < 12 else Reply(status=503)

    with JudgeServer(until_it_fails) as server:
        path = recipe(tmp_path, "judge", JUDGE.format(url=server.url), tail="")
        arguments = ("run", path, "--run-dir")
        assert finish(*arguments, never).returncode == 0
        asked = len(server.requests)
        server.requests.clear()
        healthy = False
        stopped = finish(*arguments, run)
        assert stopped.returncode == 1, stopped.stderr
        assert f"{server.url} (model judge-1) is down since" in stopped.stderr and "503" in stopped.stderr
        assert "Traceback" not in stopped.stderr
        finished = sum(chunk_file(run, number).exists() for number in range(CHUNKS))
        assert 3 <= finished < CHUNKS
        rollouts = {p.name: p.stat().st_mtime_ns for p in (run / "cold" / "rollouts").iterdir()}
        assert len(rollouts) == finished + 1  # the chunk that waited for the judge is sampled
        healthy = True
        again = finish(*arguments, run)
        assert again.returncode == 0, again.stderr
        assert made(run) == made(never)
        after = {p.name: p.stat().st_mtime_ns for p in (run / "cold" / "rollouts").iterdir()}
        assert {name: after[name] for name in rollouts} == rollouts
    rows = [json.loads(line) for line in (run / "cold" / "data.jsonl").read_text().splitlines()]
    judged = [row for row in rows if row["domain"] == "free"]
    assert asked > 12 and len(judged) > 5
    assert all(row["messages"][1]["content"][-1] in "02468" for row in judged)
    assert json.loads((run / "cold" / "card.json").read_text())["judge"] == "judge-1"


def test_two_replicas_make_the_same_data(whole: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    only_pretrained(whole, run)
    process = finish("run", whole.recipe, "parallel.data=2", "--run-dir", run, "--until", "cold")
    assert process.returncode == 0, process.stderr
    assert (run / "cold" / "data.jsonl").read_bytes() == (whole.folder / "cold" / "data.jsonl").read_bytes()
