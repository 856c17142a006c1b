"""What an evaluation measures beyond accuracy, and only when asked."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig
from megatron_r1.config.stages import AskedProblems, ProblemSet
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.observe.names import check_names, of_benchmark
from megatron_r1.parallel.world import World
from megatron_r1.train.evaluate import evaluate, heldout_prompts
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


SUMS = {"source": "generator", "task": "chain_sum"}


def asked(benchmark: str | None = None, prompts: dict[str, Any] | None = None, **keys: Any) -> AskedProblems:
    key = "stage.e" if benchmark is None else f"benchmark.{benchmark}"
    return AskedProblems(
        benchmark, key, ProblemSet.model_validate(keys), PromptsConfig.model_validate({**SUMS, **(prompts or {})})
    )


def measured(world: World, **keys: Any) -> dict[str, float]:
    prompts = [
        Prompt(id=question, question=question, text=question, token_ids=[1], answer="8", verifier="integer")
        for question in ("5+3=?", "计算5+3=?")
    ]
    engine = Engine("<think>so 所以</think><answer>8</answer>", "<think>所以</think><answer>7</answer>")
    found = evaluate(asked(k=2, **keys), prompts, engine, world, 0, verifier_workers=1)  # type: ignore[arg-type]
    named = evaluate(asked("a-b", k=2, **keys), prompts, engine, world, 0, verifier_workers=1)  # type: ignore[arg-type]
    metrics, groups = found.metrics, found.groups
    assert {of_benchmark(name): value for name, value in named.metrics.items()} == {
        ("a-b", name): value for name, value in metrics.items()
    }
    check_names(list(named.metrics))
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


def test_problems_are_the_first_of_the_source_with_its_domain() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(kind="char"))
    fixed = {"options": {"terms": 3, "digits": 1}, "size": 20, "seed": 5, "shuffle": False, "domain": "sums"}
    prompts = heldout_prompts(asked("a", fixed, problems=6), tokenizer)
    assert [prompt.id for prompt in prompts] == [f"chain_sum@5:{i}" for i in range(6)]
    assert {prompt.domain for prompt in prompts} == {"sums"}
    shuffled = [p.id for p in heldout_prompts(asked("a", {**fixed, "shuffle": True}, problems=20), tokenizer)]
    assert shuffled != sorted(shuffled) and len(set(shuffled)) == 20
    with pytest.raises(UserError, match=r"benchmark\.a\.problems = 21, but its source holds 20: set problems = 20"):
        heldout_prompts(asked("a", fixed, problems=21), tokenizer)
    with pytest.raises(UserError, match=r"stage\.e\.problems = 21"):
        heldout_prompts(asked(None, fixed, problems=21), tokenizer)
