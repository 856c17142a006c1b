"""Which answers make pairs, verdicts against the margin, and the balance of lengths, by value."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.pair_building import TOLERANCE, Answer, balance_lengths, fault, pair_fault, preferred


def answer(text: str = "yes", tokens: int = 3, finished: bool = True) -> Answer:
    return Answer(sample=0, text=text, tokens=tokens, finished=finished)


def test_reasons_in_their_order() -> None:
    assert fault(answer()) is None
    assert fault(answer("", finished=False)) == "truncated"
    assert fault(answer(" \n", tokens=-1)) == "empty"
    assert fault(answer(tokens=-1)) == "not written"
    assert pair_fault(answer("a"), answer("b")) is None
    assert pair_fault(answer("a"), answer("a")) == "duplicate"
    assert pair_fault(answer(""), answer("b", finished=False)) == "empty"
    assert pair_fault(answer("a"), answer("a", finished=False)) == "truncated"


@pytest.mark.parametrize(
    ("mean", "outcome"),
    [
        (None, "unreadable"),
        (1.0, "undecided"),
        (-1.0, "undecided"),
        (1.25, "first"),
        (-3.0, "second"),
        (0.0, "undecided"),
    ],
)
def test_the_margin_itself_is_undecided(mean: float | None, outcome: str) -> None:
    assert preferred(mean, 1.0) == outcome


def test_a_mean_of_zero_never_decides() -> None:
    assert preferred(0.0, 0.0) == "undecided"
    assert preferred(0.25, 0.0) == "first"


def means(lengths: list[tuple[int, int]], kept: list[int]) -> tuple[float, float]:
    return tuple(sum(lengths[i][side] for i in kept) / len(kept) for side in (0, 1))  # type: ignore[return-value]


def test_long_chosen_answers_are_left_out_until_the_means_agree() -> None:
    draw = random.Random(2)
    lengths = [(draw.randint(20, 90), draw.randint(10, 70)) for _ in range(2000)]
    chosen, rejected = means(lengths, list(range(2000)))
    assert chosen - rejected > 10
    kept = balance_lengths(lengths, seed=1)
    chosen, rejected = means(lengths, kept)
    assert abs(chosen - rejected) <= TOLERANCE * (chosen + rejected) / 2
    gone = set(range(2000)) - set(kept)
    assert all(lengths[i][0] > lengths[i][1] for i in gone), "only pairs that tip the balance go"
    assert len(kept) > 900
    assert kept == balance_lengths(lengths, seed=1) == sorted(kept)
    assert kept != balance_lengths(lengths, seed=2)


def test_by_hand() -> None:
    """10 against 5 twice and 5 against 10 once: D = 5, so one of the two goes, and D = 0."""
    for seed in range(4):
        kept = balance_lengths([(10, 5), (5, 10), (10, 5)], seed)
        assert kept in ([0, 1], [1, 2])
    assert {tuple(balance_lengths([(10, 5), (5, 10), (10, 5)], seed)) for seed in range(8)} == {(0, 1), (1, 2)}
    # 30 - 1 = 29 is above 10: without that pair the balance would tip the other way.
    assert balance_lengths([(30, 1), (1, 20)], seed=0) == [0, 1]
    assert balance_lengths([(5, 5), (9, 9)], seed=0) == [0, 1]
    assert balance_lengths([(9, 5), (8, 2), (4, 4)], seed=0) == [2], "chosen answers are always longer"
    assert balance_lengths([], seed=0) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=20), st.integers(0, 3))
def test_it_ends_balanced_or_where_no_pair_helps(lengths: list[tuple[int, int]], seed: int) -> None:
    kept = balance_lengths(lengths, seed)
    differences = [lengths[i][0] - lengths[i][1] for i in kept]
    total, both = sum(differences), sum(sum(lengths[i]) for i in kept)
    balanced = abs(total) <= TOLERANCE * both / 2
    assert balanced or not any(d * total > 0 and abs(d) <= abs(total) for d in differences)
    before = sum(a - b for a, b in lengths)
    assert abs(total) <= abs(before) and total * before >= 0
    gone = [a - b for i, (a, b) in enumerate(lengths) if i not in kept]
    assert all(d * before > 0 for d in gone)
