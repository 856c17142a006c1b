"""Sources of prompts share phases out by weight, over a whole run to within one question, and go on from a state."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig
from megatron_r1.data.prompt_mix import PromptMix, fair_counts
from megatron_r1.data.prompts import PromptSource, open_prompts
from megatron_r1.data.tokenizers import build_tokenizer

TOKENIZER = build_tokenizer(TokenizerConfig(kind="byte"))


def source(seed: int, **keys: object) -> PromptsConfig:
    return PromptsConfig.model_validate({"source": "generator", "task": "chain_sum", "size": 50, "seed": seed, **keys})


def mix(*sources: PromptsConfig) -> PromptMix:
    return PromptMix(list(sources), TOKENIZER, seed=3)


def counts(prompts: PromptMix, number: int, step: int = 0, steps: int = 0) -> list[int]:
    taken = prompts.take(number, step, steps)
    return [sum(prompt.source == i for prompt in taken) for i in range(len(prompts.sources))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=7),
    st.lists(st.integers(1, 20), min_size=1, max_size=40),
)
def test_over_many_phases_every_source_gets_its_share(weights: list[int], phases: list[int]) -> None:
    owed = [0.0] * len(weights)
    handed = [0] * len(weights)
    asked = 0
    for number in phases:
        found, owed = fair_counts(number, weights, owed)
        assert sum(found) == number and min(found) >= 0
        handed = [a + b for a, b in zip(handed, found, strict=True)]
        asked += number
        exact = [asked * weight / sum(weights) for weight in weights]
        assert all(abs(a - b) < 1 + 1e-6 for a, b in zip(handed, exact, strict=True))
        assert owed == pytest.approx([b - a for a, b in zip(handed, exact, strict=True)], abs=1e-6)


def test_a_small_source_is_not_starved() -> None:
    """4 questions a phase, a share of 1/41: largest remainders alone would never ask the second source."""
    prompts = mix(source(1, weight=40), source(2, weight=1))
    phases = [counts(prompts, 4) for _ in range(41)]
    assert [sum(column) for column in zip(*phases, strict=True)] == [160, 4]


def test_one_source_gives_what_it_has_in_its_order() -> None:
    alone = mix(source(1, shuffle=False))
    plain = open_prompts(source(1), TOKENIZER)
    assert isinstance(plain, PromptSource)
    assert [alone.take(7), alone.take(5)] == [[plain[i] for i in range(7)], [plain[i] for i in range(7, 12)]]


def test_a_source_that_comes_later_does_not_make_up_for_what_it_missed() -> None:
    prompts = mix(source(1), source(2, last_steps=10))
    before = [counts(prompts, 4, step, 100) for step in range(0, 90, 5)]
    after = [counts(prompts, 4, step, 100) for step in (90, 95)]
    assert before == [[4, 0]] * 18 and after == [[2, 2]] * 2


def test_it_goes_on_from_a_state_to_the_question() -> None:
    sources = [source(1, weight=5), source(2, weight=2), source(3)]
    whole, part = mix(*sources), mix(*sources)
    first = [whole.take(3) for _ in range(4)]
    assert [part.take(3) for _ in range(4)] == first
    again = mix(*sources)
    again.restore(json.loads(json.dumps(part.state())))
    assert [again.take(3) for _ in range(9)] == [whole.take(3) for _ in range(9)]


def test_a_state_of_other_sources_is_refused() -> None:
    one, two = mix(source(1)), mix(source(1), source(2))
    with pytest.raises(UserError, match="there were 2 sources when the checkpoint was written and there are 1 now"):
        one.restore(two.state())
