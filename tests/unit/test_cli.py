"""The command line: what it prints, starts and refuses. The pipeline is stood in for; no rank
trains here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_r1 import cli
from megatron_r1.config.errors import UserError
from megatron_r1.config.run import RunConfig
from megatron_r1.pipeline.decide import Choice
from tests.unit.config.recipes import write

ROOT = Path(__file__).parents[2]
PAPER = 'model.precision="fp8-blockwise"'  # the one departure of the minimal recipe


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Stand-ins for the pipeline and the launcher that note what they were given."""
    seen: dict[str, Any] = {}

    def preflight(config: RunConfig, processes: int, ahead: frozenset[str]) -> None:
        seen["preflight"] = config
        if config.seed == 13:
            raise UserError("seed 13 is unlucky; take 14")

    def worker_main(config: RunConfig, run_dir: Path, choice: Choice) -> int:
        seen["worker"] = (config, run_dir, os.environ["RANK"])
        return 0

    def launch(command: list[str], nproc: int, log_dir: Path, env: dict[str, str]) -> int:
        seen["launch"] = (command, nproc, log_dir, env)
        return int(seen.get("status", 0))

    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    run, worker = (
        types.ModuleType("megatron_r1.pipeline.preflight"),
        types.ModuleType("megatron_r1.pipeline.worker"),
    )
    run.preflight = preflight  # type: ignore[attr-defined]
    worker.main = worker_main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, run.__name__, run)
    monkeypatch.setitem(sys.modules, worker.__name__, worker)
    monkeypatch.setattr("megatron_r1.pipeline.worker", worker, raising=False)
    monkeypatch.setattr("megatron_r1.cluster.local.launch", launch)
    yield seen


def test_a_dry_run_prints_toml_and_starts_nothing(
    tmp_path: Path, calls: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path)
    arguments = [
        "run",
        str(recipe),
        "seed=7",
        "--dry-run",
        "--run-dir",
        str(tmp_path / "run"),
        "stage.1.grpo.prompts=16",
    ]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    resolved = tomllib.loads(out)
    assert (resolved["seed"], resolved["stage"][1]["grpo"]["prompts"]) == (7, 16)
    assert "# layout: 1 process(es) = TP 1 x PP 1 x CP 1 x DP 1" in out
    assert "#   stage.r1.zero.grpo.prompts: 16 (paper: 512;" in out
    assert set(calls) == {"preflight"}
    assert not (tmp_path / "run").exists()


def test_run_writes_its_files_and_starts_the_layouts_ranks(
    tmp_path: Path,
    calls: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write(tmp_path)
    assert cli.main(["run", str(recipe), "parallel.tensor=2", "parallel.data=2", "threads=3", "seed=7", PAPER]) == 0
    run_dir = tmp_path / "runs" / "demo"
    command, nproc, log_dir, env = calls["launch"]
    assert nproc == 4
    assert command == [
        *(sys.executable, "-m", "megatron_r1.cli", "run", str(run_dir / "resolved.toml")),
        *("--run-dir", str(run_dir)),
    ]
    assert log_dir == run_dir / "logs" / "attempt-1"
    assert env["OMP_NUM_THREADS"] == "3"
    assert (run_dir / "recipe.toml").read_text() == recipe.read_text()
    assert tomllib.loads((run_dir / "resolved.toml").read_text())["seed"] == 7
    assert (run_dir / "departures.json").exists()
    assert "departures from the paper: none" in capsys.readouterr().out


def test_going_on_from_the_resolved_recipe_keeps_the_first_recipe(tmp_path: Path, calls: dict[str, Any]) -> None:
    run_dir = tmp_path / "run"
    recipe = write(tmp_path)
    assert cli.main(["run", str(recipe), "--run-dir", str(run_dir)]) == 0
    assert cli.main(["run", str(run_dir / "resolved.toml"), "seed=9", "--run-dir", str(run_dir)]) == 0
    assert (run_dir / "recipe.toml").read_text() == recipe.read_text()
    assert tomllib.loads((run_dir / "resolved.toml").read_text())["seed"] == 9


def test_nproc_must_fit_the_layout(tmp_path: Path, calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write(tmp_path))
    run_dir = ["--run-dir", str(tmp_path / "run")]
    assert cli.main(["run", recipe, "--nproc", "4", "parallel.tensor=2", *run_dir]) == 0
    assert calls.pop("launch")[1] == 4
    assert cli.main(["run", recipe, "--nproc", "3", "parallel.tensor=2", *run_dir]) == 2
    assert "must divide the number of processes (3)" in capsys.readouterr().err
    assert "launch" not in calls


def test_a_stopped_run_says_how_to_go_on(
    tmp_path: Path, calls: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    calls["status"] = 130
    assert cli.main(["run", str(write(tmp_path)), "--run-dir", str(tmp_path / "run")]) == 130
    assert f"megatron-r1 run {tmp_path}/run/resolved.toml --run-dir {tmp_path}/run" in capsys.readouterr().err


def test_a_rank_becomes_a_worker(tmp_path: Path, calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_dir = tmp_path / "run"
    assert cli.main(["run", str(write(tmp_path)), "seed=5", "--run-dir", str(run_dir)]) == 0
    config, given, rank = calls["worker"]
    assert (config.seed, given, rank) == (5, run_dir, "1")
    assert "launch" not in calls
    assert not run_dir.exists()  # only rank 0 writes
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["run", str(write(tmp_path)), "--run-dir", str(run_dir)]) == 0
    assert (run_dir / "resolved.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "no.toml"], "no.toml does not exist"),
        (["run", "recipe.toml", "sede=1"], "did you mean 'seed'?"),
        (["run", "recipe.toml", "seed=13"], "seed 13 is unlucky; take 14"),
        (["report", "no-such-run"], "no-such-run"),
    ],
)
def test_a_users_mistake_is_one_message_and_status_2(
    tmp_path: Path,
    calls: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-r1: error: ")
    assert expected in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [["run", "x", "--nope"], ["run", "x", "--nproc", "0"], ["report"], []])
def test_bad_arguments_are_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    for word in (
        "stage.r1-zero.grpo.prompts=16",
        "torchrun",
        "srun",
        "tiny-moe",
        "--dry-run",
        "Ctrl-C",
    ):
        assert word in text


def test_the_parent_process_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megatron_r1 import cli\n"
        "from megatron_r1.cluster import local, ranks\n"
        "from megatron_r1.config import load, departures, validate\n"
        "from megatron_r1.model.presets import preset_names; from megatron_r1.observe import "
        "rundir\n"
        f"config = load.load(Path({str(write(tmp_path))!r}), [])\n"
        f"cli._plan(config, 1, Path({str(tmp_path)!r}), []); cli.main(['config'])\n"
        "heavy = {'torch', 'megatron', 'transformers', 'datasets', 'numpy', 'sglang'} & "
        "set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(heavy)}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
