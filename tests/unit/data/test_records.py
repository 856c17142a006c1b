"""GSM8K as published, numbers, blanks, and the text of every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.data.records import clean_answer, read_record

GSM8K = {
    "question": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of "
    "babysitting. How much did she earn?",
    "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nWorking 50 minutes, she earned "
    "0.2 x 50 = $<<0.2*50=10>>10.\n#### 10",
}


def config(**keys: Any) -> PromptsConfig:
    return PromptsConfig(source="jsonl", path=Path("x.jsonl"), **keys)


def test_gsm8k_row() -> None:
    assert read_record(GSM8K, config(), "x:1") == (GSM8K["question"], "10", {}, None)


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("so it is\n#### 1,080", "1080"),
        ("#### $18", "18"),
        ("####-5", "-5"),
        ("#### 1 #### $2,000,000.50 ", "2000000.50"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (" (1, 2) ", "(1, 2)"),  # a comma means something unless GSM8K's mark stands before it
        (42, "42"),
        (42.0, "42"),
        (0.5, "0.5"),
        (True, "True"),
        (None, None),
        (float("nan"), None),
        ("  ", None),
        ("working\n#### ", None),
    ],
)
def test_clean_answer(value: Any, answer: str | None) -> None:
    assert clean_answer(value, "x:1") == answer


def test_columns_and_metadata() -> None:
    row = {"problem": "1+1=?", "solution": 2, "level": "1", "answer": "kept"}
    record = read_record(row, config(question_key="problem", answer_key="solution"), "x:1")
    assert record == ("1+1=?", "2", {"level": "1", "answer": "kept"}, None)


def test_missing_columns() -> None:
    row = {"problem": "1+1=?", "answer": "2"}
    with pytest.raises(UserError) as caught:
        read_record(row, config(), "train.jsonl:7")
    assert str(caught.value) == (
        "train.jsonl:7: no column 'question'; it has 'problem', 'answer'. Set question_key to the right one"
    )
    with pytest.raises(UserError, match=r"no column 'gold'.*Set answer_key"):
        read_record(row, config(question_key="problem", answer_key="gold"), "x:1")
    with pytest.raises(UserError, match="it has none"):
        read_record({}, config(), "x:1")


@pytest.mark.parametrize("question", ["", "  \n", None, 3])
def test_bad_question(question: Any) -> None:
    with pytest.raises(UserError, match=r"x:1: column 'question' holds .* a question is a text"):
        read_record({"question": question, "answer": "1"}, config(), "x:1")


def test_answer_may_be_missing_only_where_a_verifier_is_named() -> None:
    row = {"question": "q", "answer": None}
    with pytest.raises(UserError, match="x:1: column 'answer' is empty"):
        read_record(row, config(), "x:1")
    assert read_record(row, config(verifier="own"), "x:1").answer is None


def test_answer_of_a_wrong_kind() -> None:
    with pytest.raises(UserError, match="x:1: column 'answer' holds a list; an answer is a text"):
        read_record({"question": "q", "answer": ["1"]}, config(), "x:1")
