"""A run directory is continued only with settings under which its finished stages stay true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.load import dump
from megatron_r1.config.run import RunConfig
from megatron_r1.observe.rundir import RunDir, StageState, write_text
from megatron_r1.pipeline.continuing import check_continues


def config(**changes: Any) -> RunConfig:
    stage = {
        "kind": "grpo",
        "steps": 3,
        "optimizer": {"lr": 1e-4},
        "prompts": {"source": "generator", "task": "chain_sum"},
        "reward": [{"kind": "accuracy"}],
    }
    recipe: dict[str, Any] = {
        "name": "x",
        "seed": 1,
        "model": {"preset": "tiny-moe"},
        "tokenizer": {"kind": "char"},
        "stage": [{"name": "one", **stage}, {"name": "two", **stage}],
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        table: Any = recipe
        for name in path:
            table = table[int(name[1:])] if name.startswith("i") and name[1:].isdigit() else table[name]
        table[last] = value
    return RunConfig.model_validate(recipe)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    write_text(run.resolved, dump(config()))
    run.write_stages(
        [StageState(name="one", kind="grpo", state="done"), StageState(name="two", kind="grpo", state="running")]
    )
    return run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel": {"tensor": 2, "data": 4}},
        {"stage__i1__steps": 9},
        {"stage__i1__optimizer": {"lr": 1e-5}},
        {"threads": 2},
        {"stage__i0__micro_batch_tokens": 512},  # of a finished stage: memory and speed; results differ by rounding
        {"stage__i0__packing": False},
        {"model": {"preset": "tiny-moe", "recompute": "selective", "recompute_modules": ["mlp"]}},
    ],
)
def test_what_may_change(run: RunDir, changes: dict[str, Any]) -> None:
    check_continues(config(**changes), run)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 7}, "seed: was 1, now 7"),
        ({"model": {"preset": "tiny-dense"}}, "model.preset: was 'tiny-moe', now 'tiny-dense'"),
        ({"model": {"preset": "tiny-moe", "mtp": False}}, "model.mtp: was not set, now False"),
        ({"model": {"preset": "tiny-moe", "precision": "bf16"}}, "model.precision: was 'fp32', now 'bf16'"),
        ({"tokenizer": {"kind": "byte"}}, "tokenizer.kind: was 'char', now 'byte'"),
        ({"stage__i0__optimizer": {"lr": 1e-5}}, "stage.one.optimizer.lr: was 0.0001, now 1e-05"),
        ({"stage__i0__log_every": 4}, "stage.one.log_every: was 1, now 4"),
        ({"stage__i0__steps": 4}, "stage.one.steps: was 3, now 4"),
    ],
)
def test_what_may_not_change(run: RunDir, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match="holds a run with other settings") as caught:
        check_continues(config(**changes), run)
    assert f"  {line}\n" in str(caught.value)
    assert "--run-dir" in str(caught.value)


def test_a_new_folder_takes_anything(tmp_path: Path) -> None:
    check_continues(config(seed=7), RunDir(tmp_path / "new"))
