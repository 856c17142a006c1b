"""Limits that warn do so without flooding the log; a limit that stops leaves the batch behind."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.errors import RunFailed
from megatron_r1.config.grpo import MismatchLimit
from megatron_r1.data.tokenizers import CharTokenizer
from megatron_r1.train.dump import dump_batch
from megatron_r1.train.mismatch_watch import WARN_EVERY, MismatchStop, MismatchWatch
from megatron_r1.types import Sample

TOKENIZER = CharTokenizer(["<think>", "</think>"])
GAP = MismatchLimit(metric="policy/engine_gap", above=0.1)
ESS = MismatchLimit(metric="policy/engine_ess", below=0.5, action="stop")
MASK = MismatchLimit(metric="policy/engine_k3", above=0.0, action="mask")
FINE = {"policy/engine_gap": 0.1, "policy/engine_ess": 0.5, "policy/engine_k3": 1.0}


def watch(folder: Path, *limits: MismatchLimit, writes: bool = True) -> MismatchWatch:
    return MismatchWatch("r1-zero", limits, folder, TOKENIZER, writes=writes)


def batch() -> list[Sample]:
    ids = TOKENIZER.encode("1+2=3")
    return [
        Sample(
            token_ids=ids,
            prompt_length=4,
            advantage=-0.5,
            rollout_log_probs=[-math.inf],
            old_log_probs=[-0.25],
            reference_log_probs=None,
        )
    ]


def test_nothing_happens_within_the_limits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch(tmp_path, GAP, ESS, MASK).check(1, FINE, batch())
    assert caplog.records == [] and list(tmp_path.iterdir()) == []


def test_a_warning_comes_once_in_so_many_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watching = watch(tmp_path, GAP)
    for step in range(1, 2 * WARN_EVERY + 1):
        value = 0.1 if step in (5, 6) else 0.1 + step / 100
        watching.check(step, {"policy/engine_gap": value}, batch())
    said = [record.getMessage() for record in caplog.records]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert said[0] == "stage r1-zero, step 1: policy/engine_gap is above its limit of 0.1 (it is 0.11)"
    assert said[1].startswith(f"stage r1-zero, step {WARN_EVERY + 1}: ")
    assert said[1].endswith(f"; so it was in {WARN_EVERY - 3} step(s) since step 1")


def test_a_limit_without_its_metric_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch(tmp_path, ESS).check(3, {}, batch())
    assert "policy/engine_ess was not measured" in caplog.text


def test_a_stop_leaves_the_batch_and_the_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = {"policy/engine_gap": 0.2, "policy/engine_ess": 0.25, "policy/kl": math.nan}
    with pytest.raises(MismatchStop) as caught:
        watch(tmp_path, ESS, GAP).check(7, metrics, batch())
    assert isinstance(caught.value, RunFailed)
    path = tmp_path / "mismatch-step-000007.json"
    assert "stage r1-zero, step 7: policy/engine_ess is below its limit of 0.5 (it is 0.25)" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "policy/engine_gap is above" in caplog.text  # the warning came first
    dump: dict[str, Any] = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert dump["metrics"] == {"policy/engine_gap": 0.2, "policy/engine_ess": 0.25, "policy/kl": "nan"}
    assert dump["limits"] == [{"metric": "policy/engine_ess", "above": None, "below": 0.5, "action": "stop"}]
    assert dump["step"] == 7
    assert dump["samples"] == [
        {
            "token_ids": batch()[0].token_ids,
            "prompt_length": 4,
            "advantage": -0.5,
            "text": "1+2=3",
            "rollout_log_probs": ["-inf"],
            "old_log_probs": [-0.25],
            "reference_log_probs": None,
            "loss_mask": None,
            "routed_experts": None,
        }
    ]


def test_the_other_ranks_stop_too_and_write_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MismatchStop):
        watch(tmp_path, ESS, GAP, writes=False).check(
            7, {"policy/engine_ess": math.nan, "policy/engine_gap": 0.2}, batch()
        )
    assert caplog.records == [] and list(tmp_path.iterdir()) == []


def test_numbers_json_does_not_know_become_text_at_any_depth(tmp_path: Path) -> None:
    dump_batch(tmp_path / "x.json", [], TOKENIZER, {"sums": {"a": math.inf, "b": 1.5}, "grad_norm": math.nan})
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert found == {"sums": {"a": "inf", "b": 1.5}, "grad_norm": "nan", "samples": []}
