"""Rollout files: every value, `datasets` reads them, atomic and repeatable, removed at a resume."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.observe.rollouts import RolloutWriter, read_rollouts, rollout_files
from megatron_r1.types import Completion, Group, LanguageUse, Prompt, Score, Verdict


def completion(text: str, tokens: int, score: Score | None) -> Completion:
    return Completion(
        token_ids=list(range(tokens)),
        log_probs=[-0.5] * tokens,
        finish_reason="stop",
        weight_versions=(3, 4),
        text=text,
        score=score,
    )


def a_group(prompt_id: str = "chain_sum:7") -> Group:
    prompt = Prompt(
        id=prompt_id,
        question="1+1=?",
        text="Q: 1+1=?",
        token_ids=[1],
        answer="2",
        verifier="integer",
    )
    good = Score(
        total=1.5,
        parts={"accuracy": 1.0, "format": 0.5},
        verdict=Verdict(status="correct", extracted="2"),
    )
    odd = Score(
        total=0.0,
        parts={"accuracy": 0.0, "format": 0.0},
        verdict=Verdict(status="unknown", detail="deadline 1.0 s"),
    )
    return Group(prompt=prompt, completions=[completion("中文 2", 5, good), completion("?\n\u2028", 3, odd)])


def test_every_value_is_in_the_file(tmp_path: Path) -> None:
    path = RolloutWriter(tmp_path).write(120, [a_group()], [[1.0, -1.0]])
    assert path == tmp_path / "rollouts" / "step-000120.jsonl.gz"
    first, second = read_rollouts(path)
    assert first == {
        "step": 120,
        "prompt_id": "chain_sum:7",
        "sample": 0,
        "question": "1+1=?",
        "answer": "2",
        "text": "中文 2",
        "tokens": 5,
        "finish_reason": "stop",
        "weight_versions": [3, 4],
        "reward": 1.5,
        "reward_parts": {"accuracy": 1.0, "format": 0.5},
        "verdict": "correct",
        "extracted": "2",
        "verdict_detail": "",
        "advantage": 1.0,
    }
    assert (second["sample"], second["text"], second["advantage"]) == (1, "?\n\u2028", -1.0)
    assert (second["verdict"], second["extracted"]) == ("unknown", "")
    assert second["verdict_detail"] == "deadline 1.0 s"


def test_datasets_reads_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    # the first file has only what could mislead: no answer read, no reference, whole numbers
    first = a_group("p:0")
    first.prompt.answer = None
    first.completions = first.completions[1:]
    writer = RolloutWriter(tmp_path)
    writer.write(0, [first], [[0]])
    writer.write(16, [a_group("p:1"), a_group("p:2")], [[0.5, -0.5], [1.5, -1.5]])
    files = [str(path) for _, path in rollout_files(tmp_path)]
    table = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table["prompt_id"][:] == ["p:0", "p:1", "p:1", "p:2", "p:2"]
    assert table["answer"][:] == ["", "2", "2", "2", "2"]
    assert table["extracted"][:] == ["", "2", "", "2", ""]
    assert table["advantage"][:] == [0.0, 0.5, -0.5, 1.5, -1.5]
    assert table[1]["reward_parts"] == {"accuracy": 1.0, "format": 0.5}
    assert table["text"][1] == "中文 2"


def test_a_repeated_phase_replaces_its_file_bit_for_bit(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path)
    first = writer.write(4, [a_group()]).read_bytes()
    assert writer.write(4, [a_group()]).read_bytes() == first
    writer.write(4, [a_group("other:1")])
    assert [row["prompt_id"] for row in read_rollouts(rollout_files(tmp_path)[0][1])] == [
        "other:1",
        "other:1",
    ]


def test_a_failed_write_leaves_the_old_file_and_nothing_else_to_read(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path)
    path = writer.write(4, [a_group()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="zip"):
        writer.write(4, [a_group()], [[1.0]])
    with pytest.raises(ValueError, match="JSON"):
        writer.write(8, [a_group()], [[1.0, float("nan")]])
    assert path.read_bytes() == before
    assert [step for step, _ in rollout_files(tmp_path)] == [4]


def test_broken_unicode_is_written_and_a_missing_score_refused(tmp_path: Path) -> None:
    group = a_group()
    group.completions[0].text = "half a pair \ud83d"
    assert read_rollouts(RolloutWriter(tmp_path).write(0, [group]))[0]["text"] == "half a pair ?"
    group.completions[1].score = None
    with pytest.raises(ValueError, match="completion 1 of chain_sum:7 has no score"):
        RolloutWriter(tmp_path).write(0, [group])


def test_resume_removes_only_later_phases(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path)
    for step in (0, 16, 32, 1_000_000):
        writer.write(step, [a_group()])
    gone = writer.truncate_after(16)
    assert [path.name for path in gone] == ["step-000032.jsonl.gz", "step-1000000.jsonl.gz"]
    assert [step for step, _ in rollout_files(tmp_path)] == [0, 16]
    assert RolloutWriter(tmp_path / "absent").truncate_after(0) == []


def test_a_damaged_file_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "step-000000.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"step": 0}\n')[:-6])
    with pytest.raises(UserError, match="step-000000"):
        read_rollouts(path)


def test_words_of_a_language_reward(tmp_path: Path) -> None:
    group = a_group()
    for completion in group.completions:
        assert completion.score is not None
        completion.score.language = LanguageUse(target="zh", words=2.25, target_words=1.25)
    rows = read_rollouts(RolloutWriter(tmp_path).write(0, [group]))
    assert [row["language"] for row in rows] == [{"target": "zh", "words": 2.25, "target_words": 1.25}] * 2
    assert "language" not in read_rollouts(RolloutWriter(tmp_path).write(4, [a_group()]))[0]


def test_sets_that_measure_different_things_share_their_columns(tmp_path: Path) -> None:
    plain, asked = a_group("a.jsonl:0"), a_group("a.jsonl:0")
    for measured in asked.completions:
        assert measured.score is not None
        measured.score.parts = {"accuracy": 1.0, "language": 0.5}
        measured.score.language = LanguageUse(target="zh", words=4.0, target_words=2.0)
    path = RolloutWriter(tmp_path).write(0, [plain, asked], benchmarks=["sums", "chat"])
    rows = read_rollouts(path)
    assert [(row["benchmark"], row["prompt_id"], row["sample"]) for row in rows] == [
        *(("sums", "a.jsonl:0", 0), ("sums", "a.jsonl:0", 1)),
        *(("chat", "a.jsonl:0", 0), ("chat", "a.jsonl:0", 1)),
    ]
    assert rows[0]["reward_parts"] == {"accuracy": 1.0, "format": 0.5, "language": 0.0}
    assert rows[2]["reward_parts"] == {"accuracy": 1.0, "format": 0.0, "language": 0.5}
    assert rows[0]["language"] == {"target": "", "words": 0.0, "target_words": 0.0}
    assert rows[2]["language"] == {"target": "zh", "words": 4.0, "target_words": 2.0}
    assert len({tuple(row) for row in rows}) == 1  # the same columns in the same order
    assert "benchmark" not in read_rollouts(RolloutWriter(tmp_path).write(1, [plain]))[0]
    with pytest.raises(ValueError, match="shorter"):
        RolloutWriter(tmp_path).write(0, [plain, asked], benchmarks=["sums"])
