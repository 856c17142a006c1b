"""Who is a rank: torchrun's and srun's processes are, a batch script and a plain shell are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_r1.cluster.ranks import rank_variables
from megatron_r1.config.errors import UserError

STEP = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "16",  # of the job; the step is smaller
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "n[1-2]",
}


def test_a_shell_starts_ranks() -> None:
    assert rank_variables({}) is None
    assert rank_variables({"RANK": "0"}) is None


def test_torchrun() -> None:
    variables = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "5",
    }
    assert rank_variables({**variables, "HOME": "/root", **STEP}) == variables


def test_a_batch_script_is_no_rank() -> None:
    assert rank_variables({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}) is None


def test_a_step_of_one_task_starts_ranks() -> None:
    assert rank_variables({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_srun_with_an_address() -> None:
    assert rank_variables({**STEP, "MASTER_ADDR": "n1"}) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "23456",  # 20000 + job id modulo 10000
    }


def test_srun_asks_scontrol_for_the_first_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "scontrol"
    fake.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    variables = rank_variables(STEP)
    assert variables is not None
    assert variables["MASTER_ADDR"] == "n1"
    with pytest.raises(UserError, match="export MASTER_ADDR"):  # never a world of one under a wrong name
        rank_variables({**STEP, "SLURM_STEP_NODELIST": "other"})
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        rank_variables(STEP)
