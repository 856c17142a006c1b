"""The adapter of reasoning-gym: what it refuses, and problems equal to the library's own."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig
from megatron_r1.data.gym_tasks import REFUSED, GymTask
from megatron_r1.data.prompts import PromptSource, open_prompts
from megatron_r1.data.tokenizers import build_tokenizer


def test_absent_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-r1\[tasks\]'"):
        GymTask("chain_sum", {}, size=10, seed=0)


@pytest.fixture
def gym() -> Any:
    return pytest.importorskip("reasoning_gym")


def test_prompts_are_the_librarys(gym: Any) -> None:
    options = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    config = PromptsConfig(
        source="reasoning_gym",
        task="chain_sum",
        options=options,
        size=20,
        seed=5,
        template="plain",
    )
    prompts = open_prompts(config, build_tokenizer(TokenizerConfig(kind="char")))
    assert isinstance(prompts, PromptSource) and len(prompts) == 20
    reference = gym.create_dataset("chain_sum", size=20, seed=5, **options)
    for index in reversed(range(20)):
        prompt, entry = prompts[index], reference[index]
        assert prompt.id == f"chain_sum@5:{index}"
        assert (prompt.question, prompt.answer) == (entry["question"], entry["answer"])
        assert prompt.verifier == "reasoning_gym"
        assert prompt.metadata["task"] == "chain_sum"
        score = gym.get_score_answer_fn(prompt.metadata["task"])
        assert score(prompt.answer, prompt.metadata["entry"]) == 1.0


def test_task_without_a_reference_answer(gym: Any) -> None:
    question, answer, metadata = GymTask("graph_color", {}, size=2, seed=0).problem(0)
    assert answer is None
    assert question == metadata["entry"]["question"]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_tasks(gym: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is refused: {REFUSED[name][:10]}"):
        GymTask(name, {}, size=2, seed=0)


def test_every_refused_task_is_the_librarys(gym: Any) -> None:
    """A renamed task would slip through."""
    from reasoning_gym.factory import DATASETS

    assert set(REFUSED) <= set(DATASETS)


def test_unknown_task_and_options(gym: Any) -> None:
    with pytest.raises(UserError, match="has no 'nope'; allowed are ab, acre") as caught:
        GymTask("nope", {}, size=2, seed=0)
    assert "game_of_life_halting" not in str(caught.value)
    with pytest.raises(UserError, match=r"refuses .*; it takes min_terms, max_terms"):
        GymTask("chain_sum", {"terms": 3}, size=2, seed=0)
    with pytest.raises(UserError, match=r"refuses .*; it takes min_terms"):
        GymTask("chain_sum", {"min_terms": 5, "max_terms": 2}, size=2, seed=0)
    with pytest.raises(UserError, match="seed is a key of the prompts table itself"):
        GymTask("chain_sum", {"seed": 3}, size=2, seed=0)


def test_a_failing_generator_names_the_problem(gym: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = GymTask("chain_sum", {}, size=2, seed=0)

    class Broken:
        def __getitem__(self, index: int) -> Any:
            raise RuntimeError("no luck")

    monkeypatch.setattr(task, "_dataset", Broken())
    with pytest.raises(UserError, match=r"cannot make problem 1 \(RuntimeError: no luck\)"):
        task.problem(1)
