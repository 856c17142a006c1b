"""What a whole run leaves behind and shows: files, numbers, terminal; dry runs, torchrun, seeds."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.load import load
from megatron_r1.data.corpus import Corpus
from megatron_r1.data.heldout import question_hash
from megatron_r1.observe.names import METRICS, format_value
from tests.e2e.conftest import Finished
from tests.e2e.recipes import (
    GRPO_STEPS,
    ROOT,
    STAGES,
    checkpoints,
    command,
    differences,
    environment,
    finish,
    lines,
    loop_state,
    rollouts,
)

PROMPTS, GROUP = 4, 4


def heldout_questions(run: Path) -> set[str]:
    return {row["question"] for rows in rollouts(run, "eval-base").values() for row in rows}


def test_every_stage_is_done_in_order(reference: Finished) -> None:
    states = json.loads((reference.folder / "stages.json").read_text())["stages"]
    assert [(s["name"], s["state"], s["steps_done"]) for s in states] == [
        ("pretrain", "done", 60),
        ("eval-base", "done", 8),  # completions
        ("r1-zero", "done", GRPO_STEPS),
        ("eval-r1-zero", "done", 8),
    ]
    for before, after in pairwise(states):
        assert before["started"] <= before["finished"] <= after["started"]
    assert (reference.folder / "recipe.toml").read_text() == reference.recipe.read_text()
    resolved = reference.folder / "resolved.toml"
    assert load(resolved) == load(reference.recipe)
    assert tomllib.loads(resolved.read_text())["stage"][0]["optimizer"]["beta2"] == 0.95  # a default, filled in


def test_checkpoints_are_kept_as_asked(reference: Finished) -> None:
    assert checkpoints(reference.folder, "pretrain") == ["step-00000048", "step-00000060"]
    assert checkpoints(reference.folder, "r1-zero") == ["step-00000003", "step-00000006"]


def test_the_summary(reference: Finished) -> None:
    names = {"accuracy": "pass_at_1", "cons@2": "cons_at_k", "pass@2": "pass_at_k", "format": "format"}
    names |= {"mean_tokens": "length", "problems": "problems"}
    states = {s["name"]: s for s in json.loads((reference.folder / "stages.json").read_text())["stages"]}
    expected = []
    for trained, stage in (("pretrain", "eval-base"), ("r1-zero", "eval-r1-zero")):
        metrics = lines(reference.folder / stage)[-1]
        row = {"row": trained, "stage": stage} | {c: round(metrics[f"eval/{m}"], 4) for c, m in names.items()}
        expected.append(row | {"seconds": round(states[trained]["finished"] - states[trained]["started"], 1)})
    assert json.loads((reference.folder / "summary.json").read_text()) == expected
    assert all(0 < row["seconds"] < 300 for row in expected)
    at = reference.process.stdout.index("4 held-out problems, 2 samples each")
    shown = [line.split() for line in reference.process.stdout[at:].splitlines()]
    assert shown[1] == ["accuracy", "cons@2", "pass@2", "format", "tokens", "time"]
    assert shown[3][:3] == ["pretrain", f"{100 * expected[0]['accuracy']:.1f}", "%"]
    status = finish("status", reference.folder)
    assert [line.split()[:4] for line in status.stdout.splitlines()[3:]] == [
        ["pretrain", "pretrain", "done", "60/60"],
        ["eval-base", "eval", "done", "8/8"],
        ["r1-zero", "grpo", "done", f"{GRPO_STEPS}/{GRPO_STEPS}"],
        ["eval-r1-zero", "eval", "done", "8/8"],
    ]


def test_evaluation_metrics_follow_from_the_completions(reference: Finished) -> None:
    for stage in ("eval-base", "eval-r1-zero"):
        rows = [row for file in rollouts(reference.folder, stage).values() for row in file]
        metrics = lines(reference.folder / stage)[-1]
        assert len(rows) == 4 * 2
        assert metrics["eval/length"] == sum(row["tokens"] for row in rows) / len(rows)
        assert metrics["eval/pass_at_1"] == sum(row["verdict"] == "correct" for row in rows) / len(rows)
        assert metrics["eval/truncated"] == sum(row["finish_reason"] == "length" for row in rows) / len(rows)


def test_every_completion_is_kept_with_its_reward(reference: Finished) -> None:
    phases = rollouts(reference.folder)
    assert list(phases) == [f"step-{step:06d}.jsonl.gz" for step in range(0, GRPO_STEPS, 2)]
    metrics = {row["step"]: row for row in lines(reference.folder / "r1-zero")}
    for rows in phases.values():
        assert len(rows) == PROMPTS * GROUP
        by_prompt = {
            row["prompt_id"]: [r["sample"] for r in rows if r["prompt_id"] == row["prompt_id"]] for row in rows
        }
        assert list(by_prompt.values()) == [list(range(GROUP))] * PROMPTS
        for row in rows:
            assert row["reward"] == sum(row["reward_parts"].values())
            assert row["reward_parts"]["accuracy"] == (row["verdict"] == "correct")
            assert row["reward_parts"]["format"] in (0.0, 0.5)
        line = metrics[rows[0]["step"] + 1]
        assert line["reward/mean"] == pytest.approx(sum(row["reward"] for row in rows) / len(rows), rel=1e-12)
        assert line["rollout/tokens"] == sum(row["tokens"] for row in rows)


def test_tensorboard_holds_the_same_numbers(reference: Finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stage in STAGES:
        events = EventAccumulator(str(reference.folder / stage / "tensorboard")).Reload()
        rows = lines(reference.folder / stage)
        names = {name for row in rows for name in row} - {"step", "time"}
        assert set(events.Tags()["scalars"]) == names
        for name in names:
            expected = [(row["step"], row[name]) for row in rows if name in row]
            found = [(event.step, event.value) for event in events.Scalars(name)]
            assert [step for step, _ in found] == [step for step, _ in expected]
            # TensorBoard stores float32.
            assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_nothing_held_out_is_trained_on(reference: Finished) -> None:
    """The task has 162 questions, so training meets all four held-out ones often; each time they are skipped."""
    heldout = heldout_questions(reference.folder)
    assert len(heldout) == 4
    trained = {row["question"] for rows in rollouts(reference.folder).values() for row in rows}
    assert trained and not trained & heldout

    config = load(reference.recipe)
    last = reference.folder / "pretrain" / "checkpoints" / "step-00000060"
    hashes = {question_hash(question) for question in heldout}
    met = 0
    for corpus, state in zip(config.stage[0].corpus, loop_state(last)["batches"]["corpora"], strict=True):  # type: ignore[union-attr]
        documents = Corpus(corpus, config.seed)
        read = [next(documents) for _ in range(state["position"])]
        skipped = sum(question_hash(document.prompt) in hashes for document in read)
        assert state["excluded"] == skipped  # of all that were read, exactly the held-out ones were left out
        met += skipped
    assert met > 0


def test_the_report_holds_the_numbers_of_the_run(reference: Finished, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference.folder, run, ignore=shutil.ignore_patterns("checkpoints"))
    process = finish("report", run)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    rows: dict[str, dict[str, Any]] = {}  # the latest value of every metric
    for stage in STAGES:
        rows[stage] = {name: value for line in lines(run / stage) for name, value in line.items()}
    for stage, metric, label in (
        ("pretrain", "loss/lm", "loss/lm"),
        ("r1-zero", "reward/mean", "reward/mean"),
        ("r1-zero", "policy/entropy", "policy/entropy"),
        ("eval-base", "eval/pass_at_1", "pass@1"),
        ("eval-r1-zero", "eval/length", "length"),
    ):
        assert f"{label} {format_value(rows[stage][metric], METRICS[metric].unit)}" in text
    assert "stage.r1-zero.grpo.group_size 16 4" in text  # a departure: key, paper, here
    assert "60 / 60" in text and "6 / 6" in text
    for url in re.findall(r"""(?:src|href)\s*=\s*["']([^"'#]+)""", page):
        assert not url.startswith(("http", "//")), f"the page loads {url}"


def test_a_dry_run_writes_and_starts_nothing(reference: Finished, tmp_path: Path) -> None:
    process = finish(
        "run", reference.recipe, "--dry-run", "parallel.data=2", "--run-dir", tmp_path / "run", cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert list(tmp_path.iterdir()) == []
    assert tomllib.loads(process.stdout)["parallel"]["data"] == 2
    assert "# layout: 2 process(es) = TP 1 x PP 1 x CP 1 x DP 2" in process.stdout
    assert f"# stages: {' -> '.join(STAGES)}" in process.stdout


def test_piped_output_is_plain_and_free_of_noise(reference: Finished) -> None:
    shown = reference.process.stdout + reference.process.stderr
    assert shown.isascii()
    assert "\x1b" not in shown and "\r" not in shown
    assert "Warning" not in shown
    for line in shown.splitlines():  # every line of a log is ours
        if re.match(r"\d{4}-\d\d-\d\d ", line):
            assert " megatron_r1." in line
    assert re.search(r"^r1-zero +step 6/6 100%", shown, re.MULTILINE)


def test_a_second_run_of_a_seed_is_the_same_and_a_terminal_is_drawn_on(reference: Finished, tmp_path: Path) -> None:
    run = tmp_path / "again"
    shown = on_a_terminal("run", reference.recipe, "--run-dir", run)
    assert differences(reference.folder, run) == []
    assert "\x1b[" in shown
    assert "Warning" not in shown and "Traceback" not in shown
    assert "step 60/60 100%" in shown and "step 6/6 100%" in shown


def on_a_terminal(*arguments: str | Path) -> str:
    """Run `megatron-r1 <arguments>` on a pseudo-terminal; returns what it showed."""
    ours, theirs = pty.openpty()
    colours = {**environment(), "TERM": "xterm-256color"}
    process = subprocess.Popen(command(*arguments), cwd=ROOT, env=colours, stdout=theirs, stderr=theirs)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux says so when the last writer has closed it
            break
        parts.append(part)
    os.close(ours)
    shown = b"".join(parts).decode()
    assert process.wait(60) == 0, shown
    return shown


def test_another_seed_is_another_run(reference: Finished, tmp_path: Path) -> None:
    run = tmp_path / "other"
    process = finish("run", reference.recipe, "seed=2", "--run-dir", run)
    assert process.returncode == 0, process.stderr
    first, other = (rollouts(folder)["step-000000.jsonl.gz"] for folder in (reference.folder, run))
    assert [row["question"] for row in first] != [row["question"] for row in other]
    assert [row["text"] for row in first] != [row["text"] for row in other]
    assert heldout_questions(reference.folder) == heldout_questions(
        run
    )  # the problems are the source's, of its own seed
    assert lines(reference.folder / "pretrain")[0]["loss/lm"] != lines(run / "pretrain")[0]["loss/lm"]


def test_torchrun_joins_its_world(reference: Finished, tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    process = subprocess.run(
        [*torchrun, *command("run", reference.recipe, "--run-dir", run)[2:]],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    assert [row["step"] for row in lines(run / "r1-zero")] == list(range(1, GRPO_STEPS + 1))
    assert loop_state(run / "r1-zero" / "checkpoints" / "step-00000006")["layout"] == [1, 1, 1, 1, 1, 1, 2]  # DP 2
    assert (run / "recipe.toml").read_text() == reference.recipe.read_text()
    # Two replicas sample the same completions as one process until rounding decides between two tokens.
    assert [row["question"] for rows in rollouts(run).values() for row in rows] == [
        row["question"] for rows in rollouts(reference.folder).values() for row in rows
    ]
    assert process.stdout.count("run directory:") == 1
    assert "Traceback" not in process.stderr
