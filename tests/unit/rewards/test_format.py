"""`format_reward`: a table of strings, right ones and each way to be wrong."""

from __future__ import annotations

import time

import pytest

from megatron_r1.rewards.format import format_reward
from megatron_r1.types import Completion, FinishReason


def completion(text: str, finish_reason: FinishReason = "stop") -> Completion:
    return Completion(
        token_ids=[1],
        log_probs=[-0.1],
        finish_reason=finish_reason,
        weight_versions=(0, 0),
        text=text,
    )


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>a</think> <answer>b</answer>", 1),
        ("<think>a</think>\n\n<answer>b</answer>", 1),
        ("  \n<think>a</think><answer>b</answer>\n ", 1),
        ("<think></think><answer>b</answer>", 1),  # an empty thought is allowed
        ("<think>\n</think><answer>b</answer>", 1),
        ("<think>a\nb\n\nc</think><answer>\nd\n</answer>", 1),
        ("<think>1 < 2 > 0 <b> </b> <thinking></think><answer><x></answer>", 1),
        (r"<think>\boxed{1}</think><answer>\boxed{1}</answer>", 1),
        ("<think>想</think><answer>四十二</answer>", 1),
        ("", 0),
        ("42", 0),
        ("<answer>b</answer>", 0),
        ("<think>a</think>", 0),
        ("<think>a</think>b", 0),
        ("<think>a</think><answer></answer>", 0),  # an empty answer is not
        ("<think>a</think><answer> \n </answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("<think>a<answer>b</answer>", 0),
        ("a</think><answer>b</answer>", 0),
        ("x<think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>.", 0),
        ("<think>a</think>so<answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0),
        ("<think>a<think>b</think><answer>c</answer>", 0),
        ("<think>a</think></think><answer>c</answer>", 0),
        ("<think><answer>b</answer></think><answer>c</answer>", 0),
        ("<think>a</think><answer><think>b</think></answer>", 0),
        ("<think>a</think><answer>b</answer></answer>", 0),
        ("<Think>a</Think><answer>b</answer>", 0),
        ("<think >a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><|endoftext|>", 0),
    ],
)
def test_table(text: str, reward: int) -> None:
    assert format_reward(completion(text)) == reward


@pytest.mark.parametrize("finish_reason", ["length", "abort"])
def test_only_a_finished_completion_has_the_format(finish_reason: FinishReason) -> None:
    text = "<think>a</think><answer>b</answer>"
    assert format_reward(completion(text)) == 1
    assert format_reward(completion(text, finish_reason)) == 0


@pytest.mark.parametrize(
    "text",
    [
        "<think>" + "a" * 400_000,
        "<think>" * 50_000,
        "<think>a</think>" + " " * 400_000,
        "<think>a</think><answer>" + "<" * 400_000,
    ],
    ids=["no end", "many tags", "spaces", "brackets"],
)
def test_hostile_text_takes_linear_time(text: str) -> None:
    begin = time.process_time()
    assert format_reward(completion(text)) == 0
    assert time.process_time() - begin < 1.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>\na\n</think>\n\nThe answer is \\boxed{8}.", 1),
        ("<think></think>8", 1),
        ("<think>a</think>", 0),
        ("<think>a</think> \n", 0),
        ("<think>a</think><answer>8</answer>", 0),
        ("<think>a</think>8<think>b</think>9", 0),
        ("a</think>8", 0),
        ("so <think>a</think>8", 0),
    ],
)
def test_a_thought_and_a_summary_without_tags(text: str, reward: int) -> None:
    assert format_reward(completion(text), "think") == reward
    assert format_reward(completion(text, "length"), "think") == 0
