"""metrics.jsonl and TensorBoard: same numbers, torn lines, resume, refused names."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.observe.metrics import MetricsWriter, read_metrics
from megatron_r1.observe.names import METRICS, format_value, is_known
from megatron_r1.observe.panels import PANELS
from megatron_r1.observe.progress import SHOWN


def tensorboard_scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def steps_and(rows: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows]


def test_values_reach_both_files_under_the_same_name(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, attempt=3) as writer:
        writer.write(1, {"reward/mean": 0.25, "rollout/length": 17})
        writer.write(2, {"reward/mean": -1.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["reward/mean"] == 0.25 and lines[0]["rollout/length"] == 17.0
    assert lines[0]["time"] > 1.6e9
    assert set(lines[1]) == {"step", "time", "reward/mean"}
    folder = tmp_path / "tensorboard"
    assert tensorboard_scalars(folder, "reward/mean") == [(1, 0.25), (2, -1.5)]
    assert tensorboard_scalars(folder, "rollout/length") == [(1, 17.0)]
    assert [path.name.endswith(".attempt-3") for path in folder.iterdir()] == [True]


def test_a_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss/lm": 2.0})
    assert steps_and(read_metrics(tmp_path / "metrics.jsonl"), "loss/lm") == [(1, 2.0)]
    assert tensorboard_scalars(tmp_path / "tensorboard", "loss/lm") == [(1, 2.0)]
    writer.close()
    writer.close()


def test_unknown_names_are_refused_and_write_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match=r"reward/meen.*names\.py"):
            writer.write(1, {"reward/mean": 1.0, "reward/meen": 1.0})
        assert read_metrics(writer.path) == []


def test_nonfinite_values_are_strict_json_and_come_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        values = {"loss/total": math.nan, "optim/grad_norm": math.inf, "policy/kl": -math.inf}
        writer.write(5, {**values, "loss/lm": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads(text, parse_constant=refuse)
    assert line["loss/total"] is None and line["optim/grad_norm"] is None
    assert line["nonfinite"] == {
        "loss/total": "nan",
        "optim/grad_norm": "inf",
        "policy/kl": "-inf",
    }
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["loss/total"])
    assert (row["optim/grad_norm"], row["policy/kl"], row["loss/lm"]) == (math.inf, -math.inf, 1.0)
    assert "nonfinite" not in row


def test_resume_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, attempt=1) as writer:
        for step in range(1, 7):
            writer.write(step, {"reward/mean": float(step)})
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 7, "reward/mean": 7.')
    with MetricsWriter(tmp_path, attempt=2) as writer:
        assert writer.truncate_after(4) == 2
        assert steps_and(read_metrics(writer.path), "reward/mean") == [
            (1, 1.0),
            (2, 2.0),
            (3, 3.0),
            (4, 4.0),
        ]
        writer.write(5, {"reward/mean": 50.0})
        writer.write(6, {"reward/mean": 60.0})
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0)]
    assert steps_and(read_metrics(tmp_path / "metrics.jsonl"), "reward/mean") == expected


def test_tensorboard_forgets_the_steps_of_the_killed_attempt(tmp_path: Path) -> None:
    # one event file an attempt, read by TensorBoard itself in the order they were written
    with MetricsWriter(tmp_path, attempt=1) as writer:
        for step in range(1, 7):
            writer.write(step, {"reward/mean": float(step)})
    with MetricsWriter(tmp_path, attempt=2) as writer:
        writer.truncate_after(4)
        writer.write(5, {"reward/mean": 50.0})
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.name[-1])
    joined = tmp_path / "joined"
    joined.mkdir()
    with (joined / "events.out.tfevents.0").open("wb") as stream:
        for path in files:
            stream.write(path.read_bytes())
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    assert tensorboard_scalars(joined, "reward/mean") == expected
    shutil.rmtree(joined)


def test_opening_again_repairs_a_torn_line_before_it_appends(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss/lm": 2.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + '{"step": 2, "x": "ü'.encode()[:-1])  # cut inside a character
    assert len(read_metrics(path)) == 1
    with MetricsWriter(tmp_path) as writer:
        writer.write(2, {"loss/lm": 1.0})
    assert steps_and(read_metrics(path), "loss/lm") == [(1, 2.0), (2, 1.0)]


def test_reading_nothing_and_reading_damage(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "absent.jsonl") == []
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl.*not json"):
        read_metrics(path)


def test_names_are_group_slash_what_and_every_user_of_names_is_listed() -> None:
    for name, metric in METRICS.items():
        group, _, what = name.partition("/")
        assert group.isidentifier() and what.isidentifier(), name
        assert metric.meaning and "\n" not in metric.meaning, name
    assert SHOWN.keys() <= METRICS.keys()
    for panel in PANELS:
        assert panel.metrics.keys() <= METRICS.keys()
        assert len({METRICS[name].unit for name in panel.metrics}) == 1, panel.title


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.8125, "share", "81.2%"),
        (15230.0, "tokens/s", "15.2k"),
        (5200.0, "tokens/s", "5200"),
        (2.5e6, "tokens", "2.5M"),
        (97.94, "tokens", "97.9"),
        (16.0, "count", "16"),
        (1.3125, "reward", "1.31"),
        (0.00123, "nats", "0.0012"),
        (3e-6, "1", "3.0e-06"),
        (0.0, "1", "0"),
        (math.nan, "share", "nan"),
    ],
)
def test_values_as_people_read_them(value: float, unit: str, text: str) -> None:
    assert format_value(value, unit) == text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("reward/language", True),
        ("reward/language/zh", True),
        ("eval/language_prompts/en", True),
        ("reward/language/xx", False),
        ("reward/language/", False),
        ("reward/language/zh/en", False),
        ("reward/accuracy/zh", False),
        ("reward/language_no_words/zh", False),
        ("moe/entropy/layer_3", True),
        ("moe/entropy/zh", False),
    ],
)
def test_names_of_one_language_or_layer(tmp_path: Path, name: str, known: bool) -> None:
    assert is_known(name) == known
    with MetricsWriter(tmp_path) as writer:
        if known:
            writer.write(1, {name: 0.5})
        else:
            with pytest.raises(ValueError, match="unknown metrics"):
                writer.write(1, {name: 0.5})
