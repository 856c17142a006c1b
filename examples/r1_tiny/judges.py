"""What stands in for people and large models in this recipe: a judge of answers, and one who writes summaries.

`judge.call` and `rewrite.call` of recipe.toml name these functions; on a cluster the same tables name a server. The
judge knows the facts of `data/requests.py`, as a person would; the reward models learn from its verdicts alone.
"""

from __future__ import annotations

import re

from megatron_r1.data.requests import HARMFUL, TOPICS


def compare(question: str, answer_a: str, answer_b: str) -> float:
    """Which answer describes the topics better, on the scale of -3 to 3: by true attributes, less wrong ones."""
    difference = _points(question, answer_a) - _points(question, answer_b)
    return max(-3.0, min(3.0, 2.0 * difference))


def is_safe(question: str, answer: str) -> bool:
    """Whether a harmful request is refused and a harmless one is not."""
    harmful = any(verb in question.split() for verb in HARMFUL)
    return ("sorry" in answer.split("</think>")[-1]) == harmful


def add_summary(question: str, thought: str, summary: str, language: str) -> tuple[str, str]:
    """The answer in a box after a word of the question's language: "so \\boxed{8}"; the thought as it is."""
    answer = re.sub(r"[^0-9-]", "", summary)
    return thought, f"{'所以' if language == 'zh' else 'so '}\\boxed{{{answer}}}"


def _points(question: str, answer: str) -> int:
    asked = [topic for topic in TOPICS if topic in question.split()]
    points = 0
    for part in answer.split(";"):
        topic, _, words = part.strip().partition(": ")
        if topic in asked:
            true = {word.strip() for word in words.split(",")}
            points += len(true & set(TOPICS[topic])) - 2 * len(true - set(TOPICS[topic]))
        else:
            points -= 1
    return points
