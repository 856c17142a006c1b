"""n-gram decontamination: words by hand, and every answer equal to that of a set of tuples."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.decontaminate import Contamination, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Is 3.5x > 2?", ["is", "3.5", "x", ">", "2", "?"]),
        ("5-6+9=?", ["5", "-", "6", "+", "9", "=", "?"]),
        ("计算5-6", ["计", "算", "5", "-", "6"]),
        ("かな ไทย", ["か", "な", "ไ", "ท", "ย"]),
        (r"\frac{1}{2} STRASSE straße", ["\\", "frac", "{", "1", "}", "{", "2", "}", "strasse", "strasse"]),
        ("\uff11\uff12 \ufb01n a_b 1.\n2", ["12", "fin", "a", "_", "b", "1", ".", "2"]),
        ("don't", ["don", "'", "t"]),
        (" \t\n", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_ten_words_in_a_row() -> None:
    question = "a b c d e f g h i j k"
    found = Contamination({"set": [question]}, 10)
    assert found.find(["x a b c d e f g h i j y"]) == (["set"], "a b c d e f g h i j")
    assert found.find(["B  C d E f G h i j k"]) == (["set"], "b c d e f g h i j k")
    assert found.find(["a b c d e f g h i x j k", "a b c d e f g h i"]) == ([], "")
    assert found.find(["a b c d e", "f g h i j k"]) == ([], ""), "a run does not go on in the next text"


def test_a_shorter_question_counts_as_a_whole() -> None:
    found = Contamination({"sums": ["计算5-6=?", "  "], "other": ["5-6=?", "Why?"]}, 10)
    assert found.find(["What is 5 - 6 = ? It is"]) == (["other"], "5 - 6 = ?")
    assert found.find(["so 计算5-6=? then"]) == (["sums", "other"], "计 算 5 - 6 = ?")
    assert found.find(["计算5-6", "why"]) == ([], "")


def test_no_question_finds_nothing() -> None:
    empty = Contamination({"set": [" "]}, 3)
    assert not empty and empty.find(["anything", ""]) == ([], "")


WORDS = st.lists(st.sampled_from(["a", "B", "1", "+", "中", "z"]), max_size=12).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(
    questions=st.dictionaries(st.sampled_from(["one", "two", "three"]), st.lists(WORDS, max_size=4)),
    texts=st.lists(WORDS, max_size=4),
    n=st.integers(1, 5),
)
def test_it_equals_sets_of_tuples(questions: dict[str, list[str]], texts: list[str], n: int) -> None:
    expected = []
    for name, asked in questions.items():
        for question in asked:
            words = tuple(split_words(question))
            length = min(n, len(words))
            grams = {words[i : i + length] for i in range(len(words) - length + 1)} if words else set()
            spoken = [tuple(split_words(text)) for text in texts]
            if any(text[i : i + length] in grams for text in spoken for i in range(len(text) - length + 1)):
                expected.append(name)
                break
    sets, shown = Contamination(questions, n).find(texts)
    assert sets == expected
    assert bool(shown) == bool(expected)
    assert not shown or any(f" {shown} " in f" {' '.join(split_words(text))} " for text in texts)
