"""Evaluation statistics against enumeration and by hand."""

from __future__ import annotations

from itertools import combinations

import pytest

from megatron_r1.algorithms.pass_at_k import cons_at_k, majority_vote, pass_at_1, pass_at_k


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(combinations(samples, k))
                expected = sum(any(subset) for subset in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12), (n, c, k)


def test_pass_at_k_where_factorials_would_overflow() -> None:
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    assert pass_at_k(64, 0, 64) == 0.0
    assert pass_at_k(64, 1, 64) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_the_impossible(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"c = {c}, k = {k}"):
        pass_at_k(n, c, k)


def test_pass_at_1_weighs_problems_not_samples() -> None:
    assert pass_at_1([[True], [False] * 9, [True, False]]) == pytest.approx((1 + 0 + 0.5) / 3)
    with pytest.raises(ValueError):
        pass_at_1([[True], []])
    with pytest.raises(ValueError):
        pass_at_1([])


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["3", "5", "5"], "5"),
        (["7", "5", "5", "7"], "7"),  # a tie: the first seen
        (["5", "7", "7", "5"], "5"),
        ([None, None, None, "2"], "2"),  # what could not be read is no vote
        ([None, None], None),
        ([], None),
        (["", "", "1"], ""),  # an empty string is an answer
    ],
)
def test_majority_vote(answers: list[str | None], expected: str | None) -> None:
    assert majority_vote(answers) == expected


def test_cons_at_k() -> None:
    answers: list[list[str | None]] = [
        ["4", "4", "9"],  # the majority is right
        ["1", "1", "2"],  # the majority is wrong, a minority right
        [None, None, None],  # nobody votes
        ["8", "8", "3"],  # right, though one verdict was missed
    ]
    correct = [
        [True, True, False],
        [False, False, True],
        [False, False, False],
        [False, True, False],
    ]
    assert cons_at_k(answers, correct, 3) == 0.5
    assert cons_at_k([["1", "2", "2"]], [[False, True, True]], 3) == 1.0
    # Only the first k vote.
    assert cons_at_k([["1", "2", "2"]], [[False, True, True]], 1) == 0.0
    assert cons_at_k([["1", "2", "2"]], [[True, False, False]], 1) == 1.0


def test_cons_at_k_refuses_too_few_samples() -> None:
    with pytest.raises(ValueError, match="problem 1 has 1 answers"):
        cons_at_k([["1", "1"], ["2"]], [[True, True], [True]], 2)
    with pytest.raises(ValueError):
        cons_at_k([["1"]], [[True], [False]], 1)
