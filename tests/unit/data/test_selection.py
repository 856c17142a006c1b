"""Filters by value, duplicates, and a choice that depends on nothing but the seed and the prompt."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.sampling import FilterConfig
from megatron_r1.data.selection import (
    Candidate,
    choose,
    fault,
    first_of_text,
    longest_paragraph,
    repeats,
    text_key,
)

GOOD = Candidate(
    sample=0,
    thought="First 5 - 6 = -1.\n\nThen -1 + 9 = 8.",
    summary="8",
    tokens=30,
    status="correct",
    finished=True,
    in_format=True,
    language_share=1.0,
)
RULES = FilterConfig(paragraph=40, repeats=2, repeat_words=3, thought=5)
LOOP = "so it is so it is so it is"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"status": "wrong", "finished": False}, "wrong"),
        ({"status": "unknown", "in_format": False}, "unknown verdict"),
        ({"finished": False, "in_format": False}, "truncated"),
        ({"in_format": False, "language_share": 0.0}, "format"),
        ({"summary": ""}, "format"),
        ({"thought": "so <answer> it goes"}, "format"),
        ({"summary": "8</think>"}, "format"),
        ({"language_share": 0.94, "thought": "x" * 41}, "language"),
        ({"language_share": 0.95}, None),
        ({"thought": "x" * 40}, None),
        ({"thought": "x" * 41 + " ```"}, "paragraph"),
        ({"thought": f"{'x' * 30}\n{'y' * 30}"}, "paragraph"),  # a line break does not end a paragraph
        ({"thought": f"{'x' * 30}\n \n{'y' * 30}"}, None),
        ({"thought": f"```x\n1```\n{LOOP}"}, "code block"),
        ({"thought": "so:\n  ~~~\nx"}, "code block"),
        ({"thought": "about ~~~ 5"}, None),
        ({"thought": LOOP}, "repetition"),
        ({"thought": "so it is so it is not"}, None),
        ({"thought": "1234"}, "no thought"),
        ({"thought": "12345"}, None),
    ],
)
def test_the_first_reason_in_the_fixed_order(changes: dict, reason: str | None) -> None:
    assert fault(replace(GOOD, **changes), RULES) == reason


def test_rules_that_are_turned_off() -> None:
    lax = FilterConfig(format=False, language=0, paragraph=None, code_blocks=True, repeats=None, thought=0)
    bad = replace(GOOD, in_format=False, language_share=0.0, thought="```" + "wait " * 5000)
    assert fault(bad, lax) is None
    assert fault(replace(bad, finished=False), lax) == "truncated"
    assert fault(replace(bad, summary=" ".strip()), lax) == "format"
    assert fault(replace(bad, thought=""), lax) is None


def test_paragraphs_and_repeats_of_written_examples() -> None:
    assert longest_paragraph("") == 0
    assert longest_paragraph("ab\n\n  abcd  \n\n\nabc") == 4
    assert repeats([*"abcd"], 2) == 1
    assert repeats([*"ababab"], 2) == 3
    assert repeats([*"ababab"], 3) == 1
    assert repeats(["wait"] * 40, 8) == 5
    assert repeats(["wait"] * 39, 8) == 4
    assert repeats([*"xabcabcab"], 3) == 2  # twice whole; a third time only begun


def slow_repeats(words: list[str], least: int) -> int:
    best = 1
    for start in range(len(words)):
        for period in range(least, len(words)):
            times = 1
            while words[start + times * period :][:period] == words[start:][:period] and len(
                words[start + times * period :][:period]
            ) == period:  # fmt: skip
                times += 1
            best = max(best, times)
    return best


@given(st.lists(st.sampled_from("ab"), max_size=14), st.integers(1, 4))
def test_repeats_equal_the_slow_reference(words: list[str], least: int) -> None:
    assert repeats(words, least) == slow_repeats(words, least)


def test_the_same_text_is_kept_once_a_question() -> None:
    twice = [replace(GOOD, sample=i) for i in range(4)]
    twice[1].thought = GOOD.thought.upper().replace("\n\n", "  ")
    twice[2].summary = "8.0"
    first, others = first_of_text(twice, "5-6+9=?", frozenset())
    assert [c.sample for c in first.values()] == [0, 2] and [c.sample for c in others] == [1, 3]
    again, others = first_of_text(twice, " 5 - 6 + 9 = ? ", set(first))
    assert not again and len(others) == 4
    assert len(first_of_text(twice, "another", set(first))[0]) == 2
    # What ends the thought cannot begin the summary.
    assert text_key("q", "a b", "c") != text_key("q", "a", "b c")


def test_choices() -> None:
    found = [replace(GOOD, sample=i, tokens=tokens) for i, tokens in enumerate((7, 3, 9, 3, 9))]
    cases: list[tuple[Literal["short", "long"], int, list[int]]] = [
        ("short", 2, [1, 3]),
        ("long", 3, [0, 2, 4]),
        ("short", 3, [0, 1, 3]),
        ("long", 1, [2]),
    ]
    for prefer, keep, samples in cases:
        kept, over = choose(found, keep, prefer, 0, "p:1")
        assert [c.sample for c in kept] == samples
        assert sorted(c.sample for c in kept + over) == [0, 1, 2, 3, 4]
    assert [c.sample for c in choose(found, 9, "random", 0, "p")[0]] == [0, 1, 2, 3, 4]


def test_random_choices_are_fixed_by_seed_and_prompt_and_even() -> None:
    found = [replace(GOOD, sample=i) for i in range(4)]
    draws = [choose(found, 1, "random", 3, f"p:{i}")[0][0].sample for i in range(400)]
    assert draws == [choose(found, 1, "random", 3, f"p:{i}")[0][0].sample for i in range(400)]
    assert draws != [choose(found, 1, "random", 4, f"p:{i}")[0][0].sample for i in range(400)]
    counts = sorted(draws.count(i) for i in range(4))
    assert counts[0] > 70 and counts[-1] < 130  # 100 each, five standard deviations of 8.7 is 43


def test_long_thoughts_are_searched_in_time() -> None:
    draw = random.Random(0)
    words = [draw.choice("abcdefgh") for _ in range(20_000)]
    words[9_000:9_100] = [*words[8_000:8_020]] * 5
    assert repeats(words, 8) == 5
