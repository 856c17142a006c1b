"""Keys of the mismatch's correction and limits: defaults, and what is refused in which words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.departures import departures
from megatron_r1.config.errors import UserError
from megatron_r1.config.grpo import CorrectionConfig, MismatchLimit
from megatron_r1.config.load import dump, load
from megatron_r1.config.stages import GrpoStage
from tests.unit.config.recipes import MINIMAL, write

TABLES = """
[stage.grpo.correction]
method = "icepop"
high = 4
veto = 1e-4
[[stage.grpo.mismatch_limit]]
metric = "policy/engine_gap"
above = 0.1
action = "mask"
[[stage.grpo.mismatch_limit]]
metric = "policy/engine_ess"
below = 0.5
action = "stop"
"""


def recipe(tables: str = TABLES) -> str:
    return MINIMAL.replace('kind = "format"\n', f'kind = "format"\n{tables}')


def message(folder: Path, tables: str) -> str:
    with pytest.raises(UserError) as caught:
        load(write(folder, recipe(tables)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "bounds"),
    [
        (dict(), (0, math.inf)),
        (dict(method="tis"), (0, 2)),
        (dict(method="mis"), (0.5, 2)),
        (dict(method="cis", high=3), (0.5, 3)),
        (dict(method="icepop"), (0.5, 5)),
        (dict(method="icepop", level="sequence", low=0.1), (0.1, 5)),
        (dict(method="mis", level="geometric"), (0.9999, 1.0001)),
        (dict(method="tis", level="geometric"), (0, 1.0001)),
    ],
)
def test_bounds(config: dict[str, Any], bounds: tuple[float, float]) -> None:
    assert CorrectionConfig(**config).bounds == bounds


def test_what_is_active() -> None:
    assert not CorrectionConfig().is_active and not CorrectionConfig(old_policy="rollout").is_active
    for config in (dict(method="tis"), dict(veto=1e-4), dict(off_policy_mask=0.1)):
        assert CorrectionConfig(**config).is_active


def test_tables_are_read_and_written_back(tmp_path: Path) -> None:
    config = load(write(tmp_path, recipe()))
    stage = config.stage[1]
    assert isinstance(stage, GrpoStage) and stage.grpo.corrects_mismatch
    assert stage.grpo.correction.bounds == (0.5, 4)
    assert [(x.threshold, x.action) for x in stage.grpo.mismatch_limit] == [(0.1, "mask"), (0.5, "stop")]
    assert load(write(tmp_path, dump(config), "again.toml")) == config


def test_limits_act_on_their_side_and_on_nan() -> None:
    above, below = (
        MismatchLimit(metric="policy/engine_k3", above=0.1),
        MismatchLimit(metric="policy/engine_ess", below=0.5),
    )
    assert [above.exceeded_by(x) for x in (0.1, 0.11, math.nan)] == [False, True, True]
    assert [below.exceeded_by(x) for x in (0.5, 0.49, math.nan)] == [False, True, True]


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ("correction.low = 0.5", 'grpo.correction: low without effect: method is "none"'),
        ('correction = { level = "sequence", high = 3 }', "high, level without effect"),
        ('correction = { method = "tis", low = 0.5 }', 'low = 0.5: "tis" only truncates from above'),
        ('correction = { method = "mis", low = 1.2 }', "[low, high] = [1.2, 2] must hold 1"),
        ('correction = { method = "cis", high = 0.9 }', "[low, high] = [0.5, 0.9] must hold 1"),
        ('correction = { method = "tis", high = 0.5 }', "[low, high] = [0, 0.5] must hold 1"),
        ('correction = { method = "tis", old_policy = "rollout" }', "would count the mismatch twice"),
        ('correction.method = "tiss"', "did you mean 'tis'"),
        ("correction.veto = 1.0", "grpo.correction.veto: got 1.0; allowed: < 1"),
        ('mismatch_limit = [{ metric = "policy/engine_gap", below = 0.1 }]', "needs `above` alone, got below = 0.1"),
        ('mismatch_limit = [{ metric = "policy/engine_gap" }]', "needs `above` alone, got neither"),
        (
            'mismatch_limit = [{ metric = "policy/engine_ess", above = 1, below = 0.5 }]',
            "needs `below` alone, got above = 1, below = 0.5",
        ),
        ('mismatch_limit = [{ metric = "policy/engine_ratio_max", above = 0.5 }]', "never below 1; set above >= 1"),
        (
            'mismatch_limit = [{ metric = "policy/engine_ess", below = 0.5, action = "mask" }]',
            'action = "mask" looks at single responses, and policy/engine_ess is none of theirs (allowed: policy/en',
        ),
        (
            'mismatch_limit = [{ metric = "policy/correction_masked", above = 0.5, action = "stop" }]',
            "a mismatch_limit on policy/correction_masked can never act",
        ),
    ],
)
def test_wrong_combinations_are_refused(tmp_path: Path, tables: str, words: str) -> None:
    assert words in message(tmp_path, f"[stage.grpo]\n{tables}\n")


def test_a_correction_and_a_masking_limit_are_departures_a_warning_is_none(tmp_path: Path) -> None:
    def found(tables: str) -> dict[str, str]:
        listed = departures(load(write(tmp_path, recipe(tables)), ["model.precision=fp8-blockwise"]))
        return {d.key.removeprefix("stage.r1.zero.grpo."): d.here for d in listed}

    assert found(TABLES) == {
        "correction.method": "icepop",
        "correction.veto": "0.0001",
        "mismatch_limit": "mask policy/engine_gap above 0.1",
    }
    assert found(TABLES.replace('"mask"', '"warn"').replace('method = "icepop"\nhigh = 4\nveto = 1e-4', "")) == {}
    assert found('[stage.grpo.correction]\nold_policy = "rollout"\noff_policy_mask = 0.2\n') == {
        "correction.off_policy_mask": "0.2",
        "correction.old_policy": "rollout",
    }
