"""`megatron-r1 status`: every state, step, time and metric by hand; live and dead runs; files in any condition."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_r1 import cli
from megatron_r1.config.errors import UserError
from megatron_r1.observe import liveness
from megatron_r1.observe import status as module
from megatron_r1.observe.liveness import at_work, holder
from megatron_r1.observe.rundir import RunDir, StageState
from megatron_r1.observe.status import read_status, status_json, status_table, watch

NOW = 10_000.0
ROOT = Path(__file__).parents[3]


def write_lines(run: RunDir, stage: str, *lines: dict[str, Any], torn: str = "") -> None:
    path = run.stage(stage).metrics
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run in the middle of its RL stage."""
    run = RunDir(tmp_path / "r1")
    run.path.mkdir()
    run.resolved.write_text('name = "r1"\n')
    run.write_stages(
        [
            StageState(
                name="base", kind="pretrain", state="done", steps=9, steps_done=9, started=1000.0, finished=4723.0
            ),
            StageState(
                name="eval",
                kind="eval",
                state="done",
                steps=64,
                steps_done=64,
                result={"eval/a/pass_at_1": 0.25, "eval/a/k": 4.0, "eval/b/pass_at_1": 1.0, "styles/a": {"steps": 1}},
            ),
            StageState(name="zero", kind="grpo", state="running", steps=100, steps_done=10, started=9000.0),
            StageState(name="sft", kind="sft", why="data.path: was a.jsonl, now b.jsonl"),
            StageState(name="out", kind="export"),
        ]
    )
    write_lines(run, "base", {"step": 9, "time": 4700.0, "loss/lm": 1.5, "time/step": 3.0})
    write_lines(
        run,
        "zero",
        {"step": 9, "time": 8000.0, "reward/accuracy": 0.1, "time/step": 500.0},  # of the attempt before
        {"step": 10, "time": 9100.0, "reward/accuracy": 0.5, "policy/kl": 0.01, "time/step": 40.0},
        {"step": 20, "time": 9600.0, "reward/accuracy": 0.75, "time/step": 40.0},
        torn='{"step": 21, "reward/acc',
    )
    return run


@contextlib.contextmanager
def working(run: RunDir) -> Iterator[subprocess.Popen[str]]:
    """Another process that is at work in the run's directory."""
    code = (
        "import sys; from pathlib import Path; from megatron_r1.observe.rundir import RunDir\n"
        "from megatron_r1.observe.liveness import at_work\n"
        "with at_work(RunDir(Path(sys.argv[1]))):\n    print('ready', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_run_at_work(run: RunDir) -> None:
    with working(run):
        found = read_status(run, NOW)
    assert (found.name, found.state) == ("r1", "running")
    rows = [(s.name, s.kind, s.state, s.steps_done, s.steps, s.elapsed, s.eta, s.metrics, s.note) for s in found.stages]
    why = "data.path: was a.jsonl, now b.jsonl"
    assert rows == [
        ("base", "pretrain", "done", 9, 9, 3723.0, None, {"loss/lm": 1.5}, ""),
        ("eval", "eval", "done", 64, 64, None, None, {"eval/a/pass_at_1": 0.25, "eval/b/pass_at_1": 1.0}, ""),
        # 50 s a step since this attempt began, 80 to go, the last one 400 s ago
        ("zero", "grpo", "running", 20, 100, 1000.0, 3600.0, {"reward/accuracy": 0.75, "policy/kl": 0.01}, ""),
        ("sft", "sft", "stale", 0, 0, None, None, {}, why),
        ("out", "export", "pending", 0, 0, None, None, {}, ""),
    ]
    title, columns, cells = status_table(found)
    assert title == "r1: running, 2 of 5 stages done"
    assert columns == ["stage", "kind", "state", "steps", "elapsed", "eta", "result", "note"]
    assert cells[0] == ["base", "pretrain", "done", "9/9", "1:02:03", "-", "loss 1.50", ""]
    assert cells[1][-2] == "a pass@1 25.0%, b pass@1 100.0%"
    assert cells[2] == ["zero", "grpo", "running", "20/100", "0:16:40", "1:00:00", "accuracy 75.0%, KL 0.0100", ""]
    assert cells[3] == ["sft", "sft", "stale", "-", "-", "-", "-", why]


def test_a_killed_run_is_stopped(run: RunDir) -> None:
    with working(run) as process:
        assert holder(run) == (True, socket.gethostname())
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert holder(run) == (False, socket.gethostname())
    found = read_status(run, NOW)
    zero = found.stages[2]
    # up to its last sign of life, and nothing is promised
    assert (found.state, zero.state, zero.elapsed, zero.eta) == ("stopped", "stopped", 600.0, None)


def test_a_second_run_is_refused(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "TRIES", 2)
    with working(run) as process:
        where = rf"process {process.pid} on {re.escape(socket.gethostname())}"
        with pytest.raises(UserError, match=rf"another run is at work.*\({where}\).*--run-dir"), at_work(run):
            pass
        assert holder(run).held
    with at_work(run):  # and afterwards it may go on
        assert run.lock_file.read_text() == f"{socket.gethostname()} {os.getpid()}\n"


def test_a_run_without_a_lock_is_believed_for_a_while(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert holder(run) == (None, "")
    for path in run.path.rglob("*"):
        os.utime(path, (9600.0, 9600.0))
    os.utime(run.stages_file, (9650.0, 9650.0))
    monkeypatch.setattr(module, "SILENCE", 350.0)
    assert read_status(run, 9650.0 + 351.0).stages[2].state == "running"
    assert read_status(run, 9650.0 + 350.0).stages[2].note == ""
    assert read_status(run, 9650.0 + 351.0).stages[2].note == "no sign of life for 0:05:51"
    monkeypatch.setattr(module, "SILENCE", 10.0)  # five steps of 50 s are longer
    assert read_status(run, 9650.0 + 250.0).stages[2].note == ""
    assert read_status(run, 9650.0 + 251.0).stages[2].note == "no sign of life for 0:04:11"


def test_a_lock_of_another_machine_is_doubted(run: RunDir) -> None:
    with at_work(run):
        pass
    run.lock_file.write_text("elsewhere 17\n")
    for path in (run.path, *run.path.rglob("*")):
        os.utime(path, (9600.0, 9600.0))
    assert holder(run) == (False, "elsewhere")
    assert read_status(run, 9600.0 + 300.0).stages[2].state == "running"  # its locks may not reach this machine
    assert read_status(run, 9600.0 + 301.0).stages[2].state == "stopped"


def test_an_evaluation_counts_completions_and_an_old_pace_helps_a_new_attempt(run: RunDir) -> None:
    run.update_stage("zero", state="pending")
    run.update_stage("eval", state="running", steps_done=16, started=NOW - 80.0, result={})
    with working(run):
        found = read_status(run, NOW).stages[1]
        assert (found.elapsed, found.eta, found.metrics) == (80.0, 240.0, {})
        # zero was resumed and has taken no step since: 90 to go at the mean of its last lines' time/step
        run.update_stage("zero", state="running", started=9900.0, steps_done=20)
        write_lines(run, "zero", {"step": 19, "time": 9590.0, "time/step": 30.0}, {"step": 20, "time": 9600.0})
        found = read_status(run, NOW).stages[2]
        assert (found.steps_done, found.elapsed, found.eta) == (20, 100.0, 80 * 30.0 - 100.0)


def test_a_run_that_has_only_begun_shows_its_recipe(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.resolved.write_text('name = "new"\n[[stage]]\nname = "a"\nkind = "sft"\n[[stage]]\nname = "b"\nkind = "eval"\n')
    found = read_status(run, NOW)
    assert (found.state, [(s.name, s.kind, s.state) for s in found.stages]) == (
        "pending",
        [("a", "sft", "pending"), ("b", "eval", "pending")],
    )
    run.write_stages([StageState(name="a", kind="sft", state="done"), StageState(name="b", kind="eval")])
    assert read_status(run, NOW).state == "stopped"
    run.update_stage("b", state="failed")
    assert read_status(run, NOW).state == "failed"
    run.update_stage("b", state="done")
    assert read_status(run, NOW).state == "done"


def test_json_is_strict(run: RunDir) -> None:
    write_lines(run, "base", {"step": 9, "time": 4700.0, "loss/lm": None, "nonfinite": {"loss/lm": "nan"}})
    shown = json.loads(json.dumps(status_json(read_status(run, NOW)), allow_nan=False))
    assert (shown["run"], len(shown["stages"]), shown["stages"][0]["metrics"]) == ("r1", 5, {"loss/lm": None})
    assert shown["stages"][0] | {"metrics": {}} == {
        **{"name": "base", "kind": "pretrain", "state": "done", "steps_done": 9, "steps": 9},
        **{"elapsed": 3723.0, "eta": None, "metrics": {}, "note": ""},
    }


def test_only_the_end_of_long_metrics_is_read(run: RunDir) -> None:
    lines = [{"step": n, "time": 9000.0 + n, "reward/accuracy": n / 1e6, "pad": "x" * 400} for n in range(1, 5001)]
    write_lines(run, "zero", *lines)
    text = run.stage("zero").metrics.read_bytes()
    run.stage("zero").metrics.write_bytes(b"{ damaged, long ago }\n" + text)
    with working(run):
        found = read_status(run, NOW).stages[2]
    assert (found.steps_done, found.metrics["reward/accuracy"]) == (5000, 0.005)


def test_watching_ends_with_the_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        for name in ("zero", "sft", "out"):
            run.update_stage(name, state="done")

    monkeypatch.setattr(module.time, "sleep", sleep)
    out = io.StringIO()
    with working(run):
        assert watch(run, 2.5, out).state == "done"
    text = out.getvalue()
    assert slept == [2.5] and text.count("r1: ") == 2 and "r1: done, 5 of 5 stages done" in text and "\x1b" not in text


def test_the_command(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(run.path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "r1: running, 2 of 5 stages done"
    assert cli.main(["status", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][1]["metrics"] == {
        "eval/a/pass_at_1": 0.25,
        "eval/b/pass_at_1": 1,
    }
    assert cli.main(["status", str(run.path), "--table"]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("| eval | 25.0 % |")
    assert cli.main(["status", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    run.update_stage("eval", state="pending")
    assert cli.main(["status", str(run.path), "--table"]) == 2
    assert "no evaluation is done yet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["status", str(run.path), "--watch", "0"])
    assert "allowed: seconds from 0.1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stages.json", "resolved.toml", "zero/metrics.jsonl"])
def test_damaged_files_are_named(run: RunDir, name: str) -> None:
    (run.path / name).write_text("{ this is = neither\n")
    with pytest.raises(UserError, match=Path(name).name.replace(".", r"\.")):
        read_status(run, NOW)


def test_status_loads_neither_torch_nor_numpy(run: RunDir) -> None:
    code = "import sys; from megatron_r1.cli import main; main(sys.argv[1:])\n"
    code += "print(sorted({'torch', 'megatron', 'numpy', 'transformers', 'tensorboard'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, "status", str(run.path)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.splitlines()[-1] == "[]"
