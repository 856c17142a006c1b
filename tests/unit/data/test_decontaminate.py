"""n-gram decontamination: words by hand, and every answer equal to that of a set of tuples."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.decontaminate import Contamination, split_words, spoken


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
    found = Contamination({"sums": ["计算5-6=?", "  "], "other": ["5-6=?", "Why?", "?!"]}, 10)
    assert found.find(["What is 5 - 6 = ? It is"]) == (["other"], "5 - 6 = ?")
    assert found.find(["so 计算5-6=? then"]) == (["sums", "other"], "计 算 5 - 6 = ?")
    assert found.find(["计算5-6", "why"]) == ([], "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (r"\frac{1}{2} x \alpha", ["1", "2", "x"]),
        (r"a \\b \5 _c", ["a", "b", "5", "c"]),  # two backslashes end a line
        ("计算5-6=?", ["计", "算", "5", "6"]),
        ("(「-」…)", []),
    ],
)
def test_signs_say_nothing(text: str, words: list[str]) -> None:
    assert spoken(split_words(text)) == words


QUESTION = (
    r"Let $x, y, z$ be positive reals with $\frac{x}{y} + \frac{y}{z} + \frac{z}{x} = 5$. Find the least possible "
    r"value of $\sqrt{x^2 + y^2 + z^2} \cdot \left(\frac{1}{x} + \frac{1}{y}\right)$."
)
SHORT = r"Compute $\int_0^1 x^2 \, dx$."


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # Harmless: formulas of the same form, or even the same formula, in another question.
        (r"Show that $\frac{x}{y} + \frac{y}{z} + \frac{z}{x} \ge 3$ for all positive $x, y, z$.", False),
        (r"$\left(\frac{1}{x} + \frac{1}{y}\right) = \frac{x+y}{xy}$, hence $\frac{1}{x}+\frac{1}{y} \ge 2$.", False),
        (r"Let $a, b$ be positive reals with $a + b = 5$. Find the least possible value of $ab$.", False),
        (r"$\sqrt{x^2 + y^2 + z^2} \cdot \left(\frac{1}{a} + \frac{1}{b}\right) \le \frac{1}{2}$", False),
        (r"Compute $\int_0^1 x^3 \, dx$ by the power rule.", False),
        (r"\begin{align*} &= \frac{\left(1\right)}{\left(2\right)} \\ &= \left\{ \cdot \right\} \end{align*}", False),
        # Copied, also with other signs and layout.
        (f"Solve this. {QUESTION} Think first.", True),
        ("let X, Y, Z be positive reals with x/y + y/z = 1", True),
        (r"We have to find the least possible value of \[ \sqrt{x^{2}+y^{2}+z^{2}} \] here.", True),
        (f"Q: {SHORT} A: $1/3$", True),
    ],
)
def test_competition_maths(text: str, found: bool) -> None:
    contamination = Contamination({"aime": [QUESTION, SHORT]}, 10)
    assert contamination.find([text])[0] == (["aime"] if found else [])


def test_answers_of_n_words_count_and_shorter_ones_do_not() -> None:
    contamination = Contamination({"set": []}, 4, {"set": ["so x = 2 it is", r"$\frac{1}{2} + 3$", "8"]})
    assert contamination.find(["then so: x, 2 it?"]) == (["set"], "so x 2 it")
    assert contamination.find([r"$\frac{1}{2} + 3$", "8", "x 2"]) == ([], "")


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
            if not any(word.isalnum() for word in split_words(question)):
                continue
            short = sum(word.isalnum() for word in split_words(question)) < n
            heard = [[w for w in split_words(text) if short or w.isalnum()] for text in (question, *texts)]
            length = len(heard[0]) if short else n
            grams = {tuple(heard[0][i : i + length]) for i in range(len(heard[0]) - length + 1)}
            if any(tuple(text[i : i + length]) in grams for text in heard[1:] for i in range(len(text) - length + 1)):
                expected.append(name)
                break
    sets, shown = Contamination(questions, n).find(texts)
    assert sets == expected
    assert bool(shown) == bool(expected)
    heard = [words for text in texts for words in (split_words(text), spoken(split_words(text)))]
    assert not shown or any(f" {shown} " in f" {' '.join(words)} " for words in heard)
