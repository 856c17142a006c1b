"""The template's exact text, and what happens to braces."""

from __future__ import annotations

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.data.templates import render


def test_r1_zero_is_the_papers_table_1() -> None:
    assert render("r1-zero", "1+1=?") == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer. The reasoning process and answer are enclosed within "
        "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning "
        "process here </think> <answer> answer here </answer>. User: 1+1=?. Assistant:"
    )


def test_plain_and_custom() -> None:
    assert render("plain", "1+1=?") == "1+1=?"
    assert render("Q: {prompt}\nA:", "why?") == "Q: why?\nA:"
    assert render("deepseek", "1+1=?") == "<｜User｜>1+1=?<｜Assistant｜>"  # noqa: RUF001


def test_braces_are_text() -> None:
    question = r"Let $S=\{1, 2\}$ and {prompt} and {0} and {x!r}"
    assert render("{a} {prompt} }{", question) == "{a} " + question + " }{"


def test_no_field() -> None:
    with pytest.raises(UserError) as caught:
        render("r1_zero", "1+1=?")
    message = str(caught.value)
    assert "'r1_zero' has no {prompt} field" in message
    assert '"r1-zero", "deepseek", "plain"' in message
