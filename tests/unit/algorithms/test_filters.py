"""Group filters: what is kept, and under which reason the rest is counted."""

from __future__ import annotations

import pytest

from megatron_r1.algorithms.filters import (
    Decision,
    apply_filters,
    filter_no_signal,
    signal,
)
from megatron_r1.types import Completion, Group, Prompt, Score, Verdict, VerdictStatus


def group(name: str, *scores: tuple[float, VerdictStatus]) -> Group:
    prompt = Prompt(id=name, question="", text="", token_ids=[1], answer=None, verifier="integer")
    completions = [
        Completion(
            token_ids=[2],
            log_probs=[0.0],
            finish_reason="stop",
            weight_versions=(0, 0),
            text="",
            score=Score(total=total, parts={}, verdict=Verdict(status=status)),
        )
        for total, status in scores
    ]
    return Group(prompt=prompt, completions=completions)


MIXED = group("mixed", (1.0, "correct"), (0.0, "wrong"))
FORMAT_DIFFERS = group("format", (1.0, "correct"), (1.5, "correct"))
ALL_CORRECT = group("correct", (1.0, "correct"), (1.0, "correct"))
ALL_WRONG = group("wrong", (0.0, "wrong"), (0.0, "wrong"))
UNKNOWN = group("unknown", (0.0, "wrong"), (0.0, "unknown"))
EVERY = [ALL_WRONG, MIXED, ALL_CORRECT, UNKNOWN, FORMAT_DIFFERS, ALL_WRONG]
COUNTS = {"all_equal_wrong": 2, "all_equal_correct": 1, "all_equal": 1}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (MIXED, Decision(keep=True)),
        (FORMAT_DIFFERS, Decision(keep=True)),
        (ALL_CORRECT, Decision(keep=False, reason="all_equal_correct")),
        (ALL_WRONG, Decision(keep=False, reason="all_equal_wrong")),
        (UNKNOWN, Decision(keep=False, reason="all_equal")),
    ],
    ids=lambda value: value.prompt.id if isinstance(value, Group) else "",
)
def test_signal(case: Group, expected: Decision) -> None:
    assert signal(case) == expected


def test_drop_removes_and_counts() -> None:
    result = filter_no_signal(EVERY, "drop")
    assert [g.prompt.id for g in result.kept] == ["mixed", "format"]
    assert result.dropped == result.found == COUNTS


def test_keep_only_counts() -> None:
    result = filter_no_signal(iter(EVERY), "keep")
    assert result.kept == EVERY
    assert result.dropped == {}
    assert result.found == COUNTS


def test_each_group_is_counted_once_under_the_first_refusal() -> None:
    def no_unknown(candidate: Group) -> Decision:
        unknown = any(c.score is not None and c.score.verdict.status == "unknown" for c in candidate.completions)
        return Decision(keep=not unknown, reason="unknown_verdict" if unknown else "")

    result = apply_filters(EVERY, [no_unknown, signal])
    assert [g.prompt.id for g in result.kept] == ["mixed", "format"]
    assert result.dropped == {"all_equal_wrong": 2, "all_equal_correct": 1, "unknown_verdict": 1}
    assert len(result.kept) + sum(result.dropped.values()) == len(EVERY)


def test_an_unscored_completion_is_an_error_not_a_reason() -> None:
    unscored = group("unscored", (0.0, "wrong"))
    unscored.completions[0].score = None
    with pytest.raises(ValueError, match="unscored"):
        signal(unscored)
