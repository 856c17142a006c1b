"""The run directory: paths, atomic files, stage states, what is no run directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.observe import rundir
from megatron_r1.observe.rundir import (
    Departure,
    RunDir,
    StageState,
    read_json,
    write_json,
)


def test_paths_are_the_documented_ones(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    stage = run.stage("r1-zero")
    found = [
        run.recipe,
        run.resolved,
        run.stages_file,
        run.departures_file,
        run.summary_file,
        run.report,
        stage.metrics,
        stage.tensorboard,
        stage.rollout_file(123),
        stage.checkpoints,
    ]
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "recipe.toml",
        "resolved.toml",
        "stages.json",
        "departures.json",
        "summary.json",
        "report.html",
        "r1-zero/metrics.jsonl",
        "r1-zero/tensorboard",
        "r1-zero/rollouts/step-000123.jsonl.gz",
        "r1-zero/checkpoints",
    ]


def test_attempts_count_on_from_the_highest(tmp_path: Path) -> None:
    stage = RunDir(tmp_path).stage("s")
    assert stage.next_attempt() == 1
    for attempt in (1, 2, 10):
        stage.log_dir(attempt).mkdir(parents=True)
    assert stage.next_attempt() == 11


def test_stage_states_survive_the_file_and_change_one_by_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.read_stages() == []
    first = StageState(name="a", kind="pretrain", steps=40)
    second = StageState(name="b", kind="eval")
    run.write_stages([first, second])
    run.update_stage("b", state="done", finished=9.5, result={"eval/pass_at_1": 0.5})
    assert run.read_stages() == [
        first,
        StageState(name="b", kind="eval", state="done", finished=9.5, result={"eval/pass_at_1": 0.5}),
    ]
    assert read_json(run.stages_file)["stages"][0] == {
        "name": "a",
        "kind": "pretrain",
        "state": "pending",
        "steps_done": 0,
        "steps": 40,
        "started": None,
        "finished": None,
        "why": "",
        "settings": {},
        "inputs": {},
        "outputs": {},
        "result": {},
    }
    with pytest.raises(KeyError, match="'c'"):
        run.update_stage("c", state="done")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"n": 1})

    def crash(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(rundir.os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"n": 2})
    assert read_json(path) == {"n": 1}


def test_departures_come_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.read_departures() == []
    departure = Departure(key="k", paper="10", here="0.2", why="w")
    run.write_departures([departure])
    assert run.read_departures() == [departure]


def test_what_is_no_run_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        RunDir.open(tmp_path / "absent")
    with pytest.raises(UserError, match=r"not a run directory.*stages\.json"):
        RunDir.open(tmp_path)
    (tmp_path / "recipe.toml").write_text("name = 'x'\n")
    assert RunDir.open(tmp_path).path == tmp_path


@pytest.mark.parametrize("text", ["{", "[]", '{"stages": [{"nam": 1}]}'])
def test_damaged_stage_files_name_themselves(tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path)
    run.stages_file.write_text(text)
    with pytest.raises(UserError, match=r"stages\.json"):
        run.read_stages()
