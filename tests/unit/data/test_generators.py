"""Problems are right, reproducible in any order, and refuse options they do not know."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.data.generators import build_task, keyed_random, problem_at


def read_sum(question: str) -> list[int]:
    """An independent reading of a chain_sum question."""
    assert re.fullmatch(r"\d+([+-]\d+)*=\?", question)
    return [int(number) for number in re.findall(r"[+-]?\d+", question)]


@pytest.mark.parametrize(
    ("options", "terms", "digits"),
    [
        ({}, {6}, {1}),
        ({"terms": [2, 4], "digits": 2}, {2, 3, 4}, {2}),
        ({"terms": 3, "digits": [1, 3]}, {3}, {1, 2, 3}),
    ],
)
def test_chain_sum(options: dict[str, Any], terms: set[int], digits: set[int]) -> None:
    task = build_task("chain_sum", options)
    seen_terms, seen_digits, negative = set(), set(), 0
    for index in range(300):
        question, answer, metadata = problem_at(task, 0, index)
        operands = read_sum(question)
        assert metadata == {"operands": operands, "terms": len(operands)}
        assert answer == str(sum(operands))
        assert operands[0] > 0 and 0 not in operands
        seen_terms.add(len(operands))
        seen_digits |= {len(str(abs(operand))) for operand in operands}
        negative += sum(operand < 0 for operand in operands[1:]) > 0
    assert (seen_terms, seen_digits) == (terms, digits)
    assert negative > 150
    assert task.verifier == "integer"


def test_chain_sum_without_subtraction() -> None:
    task = build_task("chain_sum", {"allow_negation": False})
    assert all("-" not in problem_at(task, 0, index).question for index in range(100))


def test_count_letters() -> None:
    task = build_task("count_letters", {"length": [3, 5], "letters": 2})
    for index in range(200):
        question, answer, metadata = problem_at(task, 0, index)
        matched = re.fullmatch(r"([ab]) in ([ab]{3,5})=\?", question)
        assert matched
        letter, word = matched.groups()
        assert answer == str(sum(character == letter for character in word))
        assert metadata == {"word": word, "letter": letter}


@pytest.mark.parametrize("name", ["chain_sum", "count_letters"])
def test_problems_depend_on_seed_and_index_alone(name: str) -> None:
    task, again = build_task(name, {}), build_task(name, {})
    forward = [problem_at(task, 3, index) for index in range(50)]
    backward = [problem_at(again, 3, index) for index in reversed(range(50))]
    assert forward == backward[::-1]
    random.seed(7)  # the global generator plays no part
    assert problem_at(task, 3, 17) == forward[17]
    assert len({problem.question for problem in forward}) > 45
    other = [problem_at(task, 4, index) for index in range(50)]
    assert sum(a.question == b.question for a, b in zip(forward, other, strict=True)) < 5


def test_pinned_across_processes_and_versions() -> None:
    """Python's salted hash must play no part, or a resumed run would see other problems."""
    questions = [problem_at(build_task("chain_sum", {}), 0, i).question for i in range(2)]
    assert questions == ["9-6+6+9+2+6=?", "8-3-4+3+4+6=?"]
    assert keyed_random("a", 1).random() != keyed_random("a", "1").random()


@pytest.mark.parametrize("name", ["chain_sum", "count_letters"])
@pytest.mark.parametrize("backwards", [False, True])
def test_work_without_errors_ends_in_the_answer(name: str, backwards: bool) -> None:
    task = build_task(name, {})
    for index in range(200):
        problem = problem_at(task, 1, index)
        assert task.work(problem, random.Random(0), 0.0, backwards)[1] == problem.answer


def test_chain_sum_work_by_hand() -> None:
    task = build_task("chain_sum", {"terms": 3})
    problem = problem_at(task, 0, 0)._replace(metadata={"operands": [5, -6, 9]}, answer="8")
    assert task.work(problem, random.Random(0), 0.0, False) == ("5-6=-1;-1+9=8", "8")
    assert task.work(problem, random.Random(0), 0.0, True) == ("9-6=3;3+5=8", "8")
    # With every step wrong, each still starts from where the last one landed.
    steps, answer = task.work(problem, random.Random(0), 1.0, False)
    matched = re.fullmatch(r"5-6=(-?\d+);(-?\d+)\+9=(-?\d+)", steps)
    assert matched
    first, carried, last = matched.groups()
    assert first == carried != "-1" and int(last) != int(carried) + 9 and answer == last


def test_count_letters_work_by_hand() -> None:
    task = build_task("count_letters", {})
    metadata = {"word": "bacab", "letter": "a"}
    problem = problem_at(task, 0, 0)._replace(metadata=metadata, answer="2")
    assert task.work(problem, random.Random(0), 0.0, False) == ("b=0;a=1;c=1;a=2;b=2", "2")
    assert task.work(problem, random.Random(0), 0.0, True) == ("b=0;a=1;c=1;a=2;b=2", "2")
    assert task.work(problem, random.Random(0), 1.0, False) == ("b=1;a=1;c=2;a=2;b=3", "3")


@pytest.mark.parametrize("name", ["chain_sum", "count_letters"])
def test_near_miss_is_never_right(name: str) -> None:
    task, rng = build_task(name, {}), random.Random(0)
    for index in range(300):
        problem = problem_at(task, 0, index)
        miss = task.near_miss(problem, rng)
        assert miss != problem.answer
        assert name == "chain_sum" or int(miss) >= 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sums", {}, "task: 'sums' is unknown; allowed are chain_sum, count_letters"),
        (
            "chain_sum",
            {"term": 3},
            "task chain_sum: unknown option term; allowed are terms, digits, allow_negation",
        ),
        ("chain_sum", {"terms": 1}, "terms = 1; allowed are an integer from 2 on or"),
        ("chain_sum", {"terms": [4, 2]}, r"terms = \[4, 2\]; allowed are"),
        ("chain_sum", {"terms": [2, 3, 4]}, r"terms = \[2, 3, 4\]; allowed are"),
        ("chain_sum", {"terms": True}, "terms = True; allowed are"),
        ("chain_sum", {"terms": "6"}, "terms = '6'; allowed are"),
        ("chain_sum", {"digits": 0}, "digits = 0; allowed are an integer from 1 on"),
        ("chain_sum", {"allow_negation": 1}, "allow_negation = 1; allowed are true and false"),
        ("count_letters", {"letters": 27}, "letters = 27; allowed is one integer from 2 to 26"),
        ("count_letters", {"letters": [2, 3]}, r"letters = \[2, 3\]; allowed is one integer"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_task(name, options)


def test_chain_sum_in_languages() -> None:
    task = build_task("chain_sum", {"languages": {"en": 1, "zh": 3}})
    chinese = 0
    for index in range(1000):
        question, answer, metadata = problem_at(task, 0, index)
        ask = {"en": "compute ", "zh": "计算"}[metadata["language"]]
        assert question.startswith(ask)
        assert read_sum(question.removeprefix(ask)) == metadata["operands"] and answer == str(sum(metadata["operands"]))
        chinese += metadata["language"] == "zh"
    assert 0.75 - 0.055 < chinese / 1000 < 0.75 + 0.055  # 4 deviations
    # The sums are those of the task without words.
    plain = build_task("chain_sum", {})
    assert all(problem_at(task, 7, i).question.endswith(problem_at(plain, 7, i).question) for i in range(50))


@pytest.mark.parametrize(
    ("languages", "message"),
    [
        ({"en": 1, "tlh": 1}, "no words for tlh; allowed are en, zh"),
        ({"en": -1}, "weights are 0 or more"),
        ({"en": 0}, "at least one is above 0"),
        ({}, "at least one is above 0"),
        (["en", "zh"], "allowed is a table"),
        ({"en": True}, "allowed is a table"),
    ],
)
def test_bad_languages(languages: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_task("chain_sum", {"languages": languages})


def test_only_tasks_with_words_take_languages() -> None:
    with pytest.raises(UserError, match="unknown option languages"):
        build_task("count_letters", {"languages": {"en": 1}})
