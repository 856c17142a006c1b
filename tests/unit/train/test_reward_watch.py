"""The reward-hacking watch on series made by hand: when it is alarmed, what it says, what a resume changes: nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.stages import GrpoStage
from megatron_r1.observe.metrics import MetricsWriter
from megatron_r1.observe.rundir import StageDir
from megatron_r1.train.reward_watch import FLAG, RewardWatch, drift


def stage(**watch: Any) -> GrpoStage:
    return GrpoStage.model_validate(
        {
            "name": "rl2",
            "kind": "grpo",
            "steps": 100,
            "optimizer": {"lr": 1e-3},
            "prompts": {"source": "generator", "task": "chain_sum"},
            "reward": [{"kind": "accuracy"}, {"kind": "model", "name": "helpful", "url": "http://x:1"}],
            "watch": {"window": 4, "rise": 0.5, "fall": 0.1, **watch},
        }
    )


def row(value: float, accuracy: float, std: float = 2.0) -> dict[str, float]:
    return {"reward/model/helpful": value, "reward/model_std/helpful": std, "reward/accuracy": accuracy}


def flags(watch: RewardWatch, rows: Sequence[dict[str, float]], first: int = 1) -> list[float | None]:
    return [watch.seen(first + i, one).get(FLAG) for i, one in enumerate(rows)]


def make(folder: Path, **keys: Any) -> RewardWatch:
    folder.mkdir(exist_ok=True)
    watch = RewardWatch(stage(**keys), StageDir(folder))
    watch.resume()
    return watch


def test_windows_by_hand() -> None:
    rows = [row(v, a) for v, a in [(0, 0.9), (2, 0.7), (1, 0.5), (3, 0.5), (4, 0.4), (6, 0.2)]]
    found = drift(rows, "helpful", window=2)
    assert found is not None
    assert (found.values, found.spread) == ((1.0, 5.0), 2.0)
    assert found.accuracy == pytest.approx((0.8, 0.3))
    assert found.rise == 2.0
    halves = drift(rows, "helpful", window=5)  # 6 phases: halves, since windows of 5 would overlap
    assert halves is not None and halves.values == (1.0, 13 / 3)
    assert drift(rows, "helpful", window=7) is None
    assert drift(rows, "safety", window=2) is None
    assert drift(rows[:1], "helpful", window=1) is None


HACKED = [row(0.0, 0.8)] * 4 + [row(4.0, 0.6)] * 4


@pytest.mark.parametrize(
    ("rows", "alarmed"),
    [
        (HACKED, True),
        ([row(0.0, 0.8)] * 4 + [row(4.0, 0.8)] * 4, False),  # the accuracy stays
        ([row(0.0, 0.8)] * 4 + [row(-4.0, 0.6)] * 4, False),  # both fall
        ([row(0.0, 0.6)] * 4 + [row(4.0, 0.8)] * 4, False),  # both rise
        ([row(0.0, 0.8)] * 4 + [row(0.9, 0.6)] * 4, False),  # 0.45 deviations
        ([row(0.0, 0.8)] * 4 + [row(1.0, 0.6)] * 4, True),  # 0.5 deviations
        ([row(0.0, 0.8)] * 4 + [row(4.0, 0.75)] * 4, False),  # 5 points
        ([row(0.0, 0.8, std=0.0)] * 4 + [row(0.1, 0.6)] * 4, True),  # any rise from equal values
    ],
)
def test_alarm(rows: list[dict[str, float]], alarmed: bool, tmp_path: Path) -> None:
    found = flags(make(tmp_path), rows)
    assert found[3] == 0.0 and found[-1] == float(alarmed)


def test_phases_without_a_reward_model_are_not_looked_at(tmp_path: Path) -> None:
    watch = make(tmp_path)
    assert flags(watch, [{"reward/accuracy": 1.0}] * 5) == [None] * 5
    assert not (tmp_path / "reward-hacking.svg").exists()
    assert flags(watch, HACKED, first=6)[-1] == 1.0, "the accuracy before the reward model is no part of the window"
    assert len(watch.rows) == 8


def test_it_warns_once_an_onset_and_draws(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = make(tmp_path)
    with caplog.at_level(logging.WARNING):
        flags(watch, [*HACKED, *[row(4.0, 0.6)] * 3])
        assert len(caplog.records) == 1
        flags(watch, [row(4.0, 0.8)] * 4, first=12)
        assert watch.rows[-1][FLAG] == 0
        flags(watch, [row(4.0, 0.5)] * 4, first=16)
    first, second = (record.getMessage() for record in caplog.records)
    # At the 5th phase: phases 1 and 2 against 4 and 5. At the 17th: 1 to 4 against 14 to 17.
    assert "stage rl2, step 5: reward hacking?" in first and "stage rl2, step 17: reward hacking?" in second
    assert "'helpful' rose from 0 to 2 (1 standard deviations) while accuracy fell from 80.0% to 70.0%" in first
    assert "'helpful' rose from 0 to 4 (2 standard deviations) while accuracy fell from 80.0% to 65.0%" in second
    assert str(tmp_path / "reward-hacking.svg") in first
    plot = (tmp_path / "reward-hacking.svg").read_text()
    assert "Mean value of reward model helpful. helpful: 4 last" in plot and "rule-judged prompts: 50.0% last" in plot
    assert plot.count('class="bad"') == sum(r[FLAG] > 0 for r in watch.rows), "a red tick for each alarmed phase"


def test_a_resumed_watch_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*HACKED, row(4.0, 0.6), row(4.0, 0.6)]
    expected = flags(make(tmp_path / "whole"), rows)
    broken = make(tmp_path / "broken")
    with MetricsWriter(tmp_path / "broken") as writer:
        for step, one in enumerate(rows[:9], start=1):
            writer.write(step, broken.seen(step, one))
            writer.write(step, {"optim/lr": 1.0})  # an optimizer step in the middle of a phase
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        resumed = make(tmp_path / "broken")
        assert flags(resumed, rows[9:], first=10) == expected[9:] == [1.0]
    assert caplog.records == [], "the alarm began before"
    assert (tmp_path / "whole" / "reward-hacking.svg").read_bytes() == (
        tmp_path / "broken" / "reward-hacking.svg"
    ).read_bytes()


def test_only_the_rank_that_writes_watches(tmp_path: Path) -> None:
    watch = RewardWatch(stage(), StageDir(tmp_path))
    assert flags(watch, HACKED) == [None] * 8 and list(tmp_path.iterdir()) == []
