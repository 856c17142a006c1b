"""What an evaluation measures beyond accuracy, and only when asked."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_r1.config.run import EvalStage
from megatron_r1.observe.names import check_names
from megatron_r1.parallel.world import World
from megatron_r1.train.evaluate import evaluate
from megatron_r1.types import Completion, Prompt


class Engine:
    """Answers every prompt with the same texts."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def generate(
        self, prompts: list[Prompt], n: int, sampling: Any, seed: int, progress: Any
    ) -> list[list[Completion]]:
        return [
            [
                Completion(token_ids=[1], log_probs=[0.0], finish_reason="stop", weight_versions=(0, 0), text=text)
                for text in self.texts
            ]
            for _ in prompts
        ]


def measured(world: World, **keys: Any) -> dict[str, float]:
    stage = EvalStage.model_validate(
        {"name": "e", "kind": "eval", "k": 2, "prompts": {"source": "generator", "task": "chain_sum"}, **keys}
    )
    prompts = [
        Prompt(id=question, question=question, text=question, token_ids=[1], answer="8", verifier="integer")
        for question in ("5+3=?", "计算5+3=?")
    ]
    engine = Engine("<think>so 所以</think><answer>8</answer>", "<think>所以</think><answer>7</answer>")
    metrics, _, groups = evaluate(stage, prompts, engine, world, seed=0)  # type: ignore[arg-type]
    assert metrics["eval/pass_at_1"] == 0.5 and metrics["eval/format"] == 1.0
    assert [len(group.completions) for group in groups] == [2, 2]
    check_names(list(metrics))
    return {name: value for name, value in metrics.items() if name.startswith("eval/language")}


def test_language_consistency(world: World) -> None:
    assert measured(world) == {}
    # 所以 is 2 / 1.6 = 1.25 words, or 1 with two characters a word.
    assert measured(world, default_language="en") == pytest.approx(
        {
            "eval/language": (1 / 2.25 + 0 + 1.25 / 2.25 + 1) / 4,
            "eval/language/en": (1 / 2.25 + 0) / 2,
            "eval/language/zh": (1.25 / 2.25 + 1) / 2,
            "eval/language_prompts/en": 0.5,
            "eval/language_prompts/zh": 0.5,
            "eval/language_no_words": 0.0,
        }
    )
    assert measured(world, default_language="en", han_per_word=2.0)["eval/language/en"] == 0.25
