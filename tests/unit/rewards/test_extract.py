"""`extract_answer`: each clause of its docstring, and linear time on hostile text."""

from __future__ import annotations

import time

import pytest

from megatron_r1.rewards.extract import MAX_ANSWER, extract_answer, summary_of


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # 1: only what follows the last </think>
        (r"<think>x</think> \boxed{42}", "42"),
        (r"<think>\boxed{41}</think> so \boxed{42}", "42"),
        (r"<think>\boxed{42}</think> so it is clear", None),
        (r"<think>\boxed{42}", None),
        (r"<think>a</think><think>\boxed{42}", None),
        (r"a</think>b</think><answer>7</answer>", "7"),  # a template may open the thought itself
        ("<answer>42</answer><think>hm", None),
        ("<think>a <answer>41</answer> b</think><answer>42</answer>", "42"),
        # 2: the last <answer> pair
        ("<answer>42</answer>", "42"),
        ("<answer>41</answer> no, <answer>42</answer>", "42"),
        ("<answer>42</answer> no, <answer>41", "42"),  # an unclosed one is not read
        ("<answer>41 <answer>42</answer></answer>", "42"),  # the innermost
        ("42</answer>", None),
        ("</answer><answer>", None),
        ("<answer>42", None),
        ("<ANSWER>42</ANSWER>", None),
        ("<answer>\n 4\n2 \n</answer>", "4\n2"),
        (r"\boxed{41}<answer>42</answer>\boxed{43}", "42"),  # a box outside the pair is not read
        (r"\boxed{41}<answer></answer>", None),
        # 3: the last box
        (r"<answer>so $\boxed{42}$ holds</answer>", "42"),
        (r"\boxed{41} wait, \boxed{42}", "42"),
        (r"\boxed{41} wait, \fbox{42}", "42"),
        (r"\boxed {42}", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),  # escaped braces need not balance
        (r"\boxed{\boxed{2}}", "2"),
        (r"\boxed{ \fbox{ \boxed{2} } }", "2"),
        (r"\boxed{\boxed{2}+1}", r"\boxed{2}+1"),
        (r"{ \boxed{42}", "42"),  # a stray brace outside
        (r"} \boxed{42}", "42"),
        (r"\boxed{42", None),
        (r"\boxed{41} \boxed{42", None),  # no way back to an earlier answer
        (r"<answer>\boxed{42</answer>", None),
        (r"<answer>41 \boxed{}</answer>", None),
        (r"\boxed 42", None),
        # 4 and 5: no box; empty; too long
        ("The final answer is 42", None),
        ("<answer>  </answer>", None),
        ("", None),
        ("<answer>答案是42。</answer>", "答案是42。"),
        (f"<answer>{'7' * MAX_ANSWER}</answer>", "7" * MAX_ANSWER),
        (f"<answer>{'7' * (MAX_ANSWER + 1)}</answer>", None),
        (rf"\boxed{{{'7' * (MAX_ANSWER + 1)}}}", None),
    ],
)
def test_rule(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 100_000,
        r"\boxed{" * 50_000 + "}" * 50_000,
        "<answer>" * 100_000,
        "<answer>1</answer>" * 50_000,
        "</think>" * 100_000 + r"\boxed{" + "{" * 100_000,
        "\\" * 300_000,
        r"\boxed" + " " * 300_000,
        (r"\boxed" + " " * 50) * 10_000,
    ],
    ids=lambda text: text[:12].strip(),
)
def test_hostile_text_takes_linear_time(text: str) -> None:
    begin = time.process_time()
    extract_answer(text)
    assert time.process_time() - begin < 1.0


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("<think>5-6=-1</think> <answer>8</answer>", "8"),
        ("<think>a</think>b</think> So <answer> 8 </answer>, as <answer>said", "So  8 , as said"),
        ("It is 8.\n", "It is 8."),  # no thought at all
        ("a thought that the template opened</think>\nIt is 8.", "It is 8."),
        ("<think>never closed <answer>8</answer>", ""),
        ("<think>a</think>b<think>c", ""),
        ("<think>a</think>", ""),
        ("", ""),
    ],
)
def test_the_summary_is_what_follows_the_thought(text: str, summary: str) -> None:
    assert summary_of(text) == summary
